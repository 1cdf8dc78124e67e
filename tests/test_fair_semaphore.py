# SPDX-License-Identifier: Apache-2.0
"""Places go to threads in the order in which they came, and none is lost."""

import random
import threading
import time

from haystack_chat_store.stores.fair_semaphore import FairSemaphore
from haystack_chat_store.testing.concurrency import in_threads


def waiting(semaphore):
    return len(semaphore._waiting)


def test_a_place_goes_to_the_thread_that_has_waited_longest():
    semaphore, order = FairSemaphore(1), []
    assert semaphore.acquire(0)

    def wait_for_a_place(number):
        assert semaphore.acquire(30)
        order.append(number)
        semaphore.release()

    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=wait_for_a_place, args=(number,)))
        threads[-1].start()
        while waiting(semaphore) <= number:
            time.sleep(0.001)
    semaphore.release()
    assert not semaphore.acquire(0) or order == [*range(5)]  # the place is not free for who comes now
    for thread in threads:
        thread.join()
    assert order == [*range(5)]


def test_a_thread_that_gives_its_place_back_does_not_take_it_from_one_that_waits():
    semaphore, got_one = FairSemaphore(1), threading.Event()
    assert semaphore.acquire(0)
    thread = threading.Thread(target=lambda: semaphore.acquire(30) and got_one.set())
    thread.start()
    while not waiting(semaphore):
        time.sleep(0.001)
    semaphore.release()
    assert not semaphore.acquire(0)
    assert got_one.wait(30)
    thread.join()


def test_no_place_is_lost_or_made_when_threads_give_up():
    semaphore, at_once, most = FairSemaphore(3), [], []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(200):
            if semaphore.acquire(rng.choice([0, 0.0005, 0.01])):
                at_once.append(seed)
                most.append(len(at_once))
                time.sleep(rng.random() / 2000)
                at_once.pop()
                semaphore.release()

    in_threads(*(lambda seed=seed: work(seed) for seed in range(8)))
    assert max(most) <= 3
    assert waiting(semaphore) == 0
    assert [semaphore.acquire(0) for _ in range(4)] == [True, True, True, False]
