# SPDX-License-Identifier: Apache-2.0
"""
What the server runs: Lua scripts, so that each call is atomic and takes one round trip. Here is what they share.

Redis does not undo what a script has done before it failed. So whatever can fail is done before the first write: all
keys are looked at, which shows those that hold something else, and what comes first among the writes is a command that
Redis refuses when it is out of memory, may not be written to, or takes no more messages into a history (APPEND to the
times, beyond proto-max-bulk-len). After that it refuses none of the script.
"""

import hashlib
from datetime import datetime, timezone
from typing import Final

from haystack_chat_store.validation import microseconds

#: The version of how histories are kept. It is recorded in every bucket, and in every history since version 2.
SCHEMA_VERSION: Final = 2
#: The moments of a `datetime`, in microseconds since 1970, UTC.
MOMENTS: Final = range(
    microseconds(datetime.min.replace(tzinfo=timezone.utc), "min"),
    microseconds(datetime.max.replace(tzinfo=timezone.utc), "max") + 1,
)
#: How many characters the time of a message takes in `times`: enough for each of them.
TIME_LENGTH: Final = 18


class Script:
    """
    A Lua script, and the digest by which a server knows it once it has run it.
    """

    def __init__(self, *parts: str) -> None:
        """
        Make a script that leaves a bucket of a newer schema version untouched.

        :param parts: The script. Its first key is the bucket's schema version.
        """
        self.text = "".join((_CHECK_SCHEMA, *parts))
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_CHECK_SCHEMA = f"""
local version = redis.call('GET', KEYS[1])
if version and tonumber(version) > {SCHEMA_VERSION} then
    return redis.error_reply('NEWERSCHEMA ' .. version)
end
"""

OF_BUCKET = """
local _, directory, expiries, names = unpack(KEYS)
"""

_CHECK_WHOLE = f"""
local function is_time(text)  -- and not what something else has left in its place
    local time = string.find(text or '', '^%-?%d+$') and tonumber(text)
    return time and time >= {MOMENTS.start} and time < {MOMENTS.stop}
end

-- A history of which something else has changed or evicted a part is neither written to nor taken for a whole one.
-- One that version 1 has written, and no later one has written to, has no times.
local function counters_of(history, contents, roles, message_ids, times)
    local counters = redis.call('HMGET', history, 'next_position', 'message_count', 'round_count', 'expires_at',
        'created_at', 'version', 'updated_at')
    local position, message_count = tonumber(counters[1] or 0), tonumber(counters[2] or 0)
    if redis.call('LLEN', contents) == position and redis.call('STRLEN', roles) == position
            and redis.call('HLEN', message_ids) == message_count and tonumber(counters[3] or 0)
            and redis.call('STRLEN', times) == (counters[6] and {TIME_LENGTH} * position or 0) then
        return counters, position, message_count
    end
end
"""

_DAMAGED = "if not counters then return redis.error_reply('DAMAGED ' .. history) end\n"

#: The keys of a bucket and of one of its histories, which is whole.
OF_BUCKET_AND_HISTORY = f"""
local _, directory, expiries, names, history, contents, roles, message_ids, times = unpack(KEYS)
{_CHECK_WHOLE}
local counters, position, message_count = counters_of(history, contents, roles, message_ids, times)
{_DAMAGED}
redis.call('ZCARD', directory)
if not counters[5] then redis.call('ZCARD', names) end
local expiring = redis.call('ZCARD', expiries)
"""

#: The keys of a history that is whole, after that of the bucket's schema version.
OF_HISTORY = f"""
local _, history, contents, roles, message_ids, times = unpack(KEYS)
{_CHECK_WHOLE}
local counters, position, message_count = counters_of(history, contents, roles, message_ids, times)
{_DAMAGED}
"""

NOW = """
local time = redis.call('TIME')
local milliseconds = time[1] * 1000 + math.floor(time[2] / 1000)
local microseconds = string.format('%.0f', time[1] * 1000000 + time[2])
"""

#: The time of each message of a history: those that are stored or, of version 1, when it was created.
STAMP = f"""
local function stamp(time) return string.format('%0{TIME_LENGTH}.0f', is_time(time) and time or 0) end
"""

#: The time to note for a change: never before that of the last change, even if the server's clock was set back.
CHANGED_AT = """
local function changed_at(time)
    return is_time(counters[7]) and tonumber(counters[7]) > tonumber(time) and counters[7] or time
end
"""

#: What comes before the first write to a bucket, or the first question for its names.
UPGRADE_BUCKET = f"""
if version and tonumber(version) < {SCHEMA_VERSION} then
    redis.call('ZCARD', names)  -- which holds something else if anything
    redis.call('ZUNIONSTORE', names, 1, directory, 'WEIGHTS', 0)
    local left = redis.call('PTTL', directory)
    if left > 0 then redis.call('PEXPIRE', names, left) end
    redis.call('SET', KEYS[1], {SCHEMA_VERSION}, 'KEEPTTL')
end
"""

#: A call that is tried again, since its answer was lost, gets the answer to what it did the first time.
ONCE = """
if call ~= '' then
    local result = string.match(redis.call('HGET', KEYS[5], 'calls') or '', call .. '=(%d+) ')
    if result then return tonumber(result) end
end
"""

# A history remembers about twenty calls: so many others may come between a call and its second attempt.
_CALLS_LENGTH = 400

#: What follows once a history has been written to.
LIST_HISTORY = f"""
redis.call('ZADD', directory, updated_at, chat_history_id)
if is_new then redis.call('ZADD', names, 0, chat_history_id) end
if not version then redis.call('SET', KEYS[1], {SCHEMA_VERSION}) end
if call ~= '' then
    local calls = call .. '=' .. string.format('%.0f', result) .. ' ' .. (redis.call('HGET', history, 'calls') or '')
    redis.call('HSET', history, 'calls', string.sub(calls, 1, {_CALLS_LENGTH}))
end
"""

#: What follows a write or a deletion in a bucket where something is to expire.
AGE_BUCKET = """
-- Histories that have expired leave the directory; some at a time, so that no call takes long.
local expired = redis.call('ZRANGEBYSCORE', expiries, '-inf', '(' .. string.format('%.0f', milliseconds),
    'LIMIT', 0, 100)
if #expired > 0 then
    for _, key in ipairs({expiries, directory, names}) do redis.call('ZREM', key, unpack(expired)) end
end
-- Where every history is to expire, the bucket does with the last of them.
local last = redis.call('ZREVRANGE', expiries, 0, 0, 'WITHSCORES')[2]
local has_end = last and redis.call('ZCARD', expiries) == redis.call('ZCARD', directory)
for key = 1, 4 do
    if has_end then redis.call('PEXPIREAT', KEYS[key], last) else redis.call('PERSIST', KEYS[key]) end
end
"""

#: What comes last in a write: the history is to expire so many milliseconds later.
EXPIRE = f"""
if ttl > 0 then
    local expires_at = string.format('%.0f', milliseconds + ttl)
    redis.call('HSET', history, 'expires_at', expires_at)
    for _, key in ipairs({{history, contents, roles, message_ids, times}}) do
        redis.call('PEXPIREAT', key, expires_at)
    end
    redis.call('ZADD', expiries, expires_at, chat_history_id)
elseif counters[4] or is_new then
    redis.call('HDEL', history, 'expires_at')
    redis.call('ZREM', expiries, chat_history_id)
    for _, key in ipairs({{history, contents, roles, message_ids, times}}) do redis.call('PERSIST', key) end
end
if ttl > 0 or expiring > 0 then
    {AGE_BUCKET}
end
"""
