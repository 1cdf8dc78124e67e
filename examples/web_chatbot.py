# SPDX-License-Identifier: Apache-2.0
"""A chatbot in the browser: streamlit run examples/web_chatbot.py -- [--llm openai] [--store postgresql://…]"""

import argparse
import base64
import queue
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import streamlit as st
from demo_agent import build_agent
from haystack.dataclasses import ChatMessage, ImageContent, ToolCallResult

from haystack_chat_store import store_from_url

USER = "me"  # with a login: st.user.email


@st.cache_resource  # once for all pages
def parts(store: str, llm: str) -> Any:
    opened = store_from_url(store, search=not store.startswith("redis"))  # Redis cannot search
    return opened, build_agent(opened, llm), ThreadPoolExecutor(100), set()


def show(message: ChatMessage) -> None:
    with st.chat_message(message.role.value):
        for call in message.tool_calls:
            with st.expander(call.tool_name, icon=":material/build:"):
                st.code(str(call.arguments), language=None)
                waiting.append((call, st.empty()))
                waiting[-1][1].text("There is no result.")
        if message.text:
            (st.text if message.is_from("user") else st.markdown)(message.text)
        for image in message.images:
            st.image(base64.b64decode(image.base64_image), width=300)


def show_result(result: ToolCallResult) -> None:
    """Show a result with its call. An id may occur twice, so it is the first such call that has no result yet."""
    for call, place in waiting:
        if call == result.origin:
            waiting.remove((call, place))
            place.code(result.result, language=None)
            return


arguments = argparse.ArgumentParser()
arguments.add_argument("--store", default="sqlite:///chat_history.db")
arguments.add_argument("--llm", choices=["demo", "openai"], default="demo")
opened, agent, threads, turns = parts(**vars(arguments.parse_args()))
store = opened.for_user(USER)  # it has this user's histories, and no others
new, go, question = uuid.uuid4().hex, st.query_params.update, None
history = st.query_params.setdefault("chat", new)
info = store.get_chat_history(history)
with st.sidebar:
    st.button("New chat", icon=":material/add:", on_click=go, args=[{"chat": new}])
    query = st.text_input("Search") if store.search else ""
    listed = store.list_chat_histories(meta={"archived": st.toggle("Archive") or None}).items
    found = store.search_messages(query, match_prefix=True) if query else listed
    for each in reversed({each.chat_history_id: each for each in reversed(found)}.values()):
        label, chat = each.snippet if query else each.title or each.preview or "An image", each.chat_history_id
        st.button(label[:60], chat, type="tertiary", disabled=chat == history, on_click=go, args=[{"chat": chat}])
if info:
    label = (info.title or info.preview or "An image")[:60]
    with st.popover(label, key=f"menu {history}"):
        if (title := st.text_input("Title", label)) != label:
            store.update_chat_history(history, title=title)
            st.rerun()
        name, to = ("Bring back", None) if info.meta.get("archived") else ("Archive", True)
        st.button(name, on_click=store.update_chat_history, args=[history], kwargs={"merge_meta": {"archived": to}})
        st.button("Delete", on_click=store.delete_chat_history, args=[history])
        if st.button("Fork"):
            store.copy_messages(history, new)
            store.update_chat_history(new, title=f"{label} (fork)")
            go({"chat": new})
            st.rerun()
limit = st.session_state.get("limit", 50)
# A page that is reloaded waits for the answer that is under way.
wait([turn for chat, turn in list(turns) if chat == history])
messages = [stored.message for stored in store.list_messages(history, limit=limit)]
waiting: list[Any] = []  # calls that have no result so far, each with the place for it
asked = None
if len(messages) == limit < 800:
    st.button("Earlier messages", on_click=st.session_state.update, args=[{"limit": limit * 2}])
for message in messages:
    for result in message.tool_call_results:
        show_result(result)
    if not message.tool_call_results:
        show(message)
    if message.is_from("user"):
        asked, asked_id = message, message.meta["chat_message_id"]
        with st.popover("Edit", type="tertiary", key=f"edit {asked_id}"), st.form(asked_id, border=False):
            text = st.text_area("Question", asked.text)
            if st.form_submit_button("Ask"):
                question, replaced_id = [ChatMessage.from_user(content_parts=[text, *asked.images])], asked_id
if asked and st.button("Ask again", icon=":material/refresh:"):
    replies = messages[messages.index(asked) + 1 :]
    question, replaced_id = [], replies[0].meta["chat_message_id"] if replies else None
if said := st.chat_input("Ask something", accept_file="multiple", file_type="image"):
    images = [ImageContent(base64.b64encode(file.getvalue()).decode(), file.type) for file in said.files]
    question, replaced_id = [ChatMessage.from_user(content_parts=[said.text, *images])], None

if question is not None:
    for message in question:
        show(message)
    with st.chat_message("assistant"):
        chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        context = {"chat_history_id": history, "user_id": USER, "replace_from_message_id": replaced_id}
        options = {"streaming_callback": lambda chunk: chunks.put(chunk.content), "hook_context": context}
        turn = threads.submit(agent.run, question, **options)  # it goes on if the page goes away
        turns.add((history, turn))
        turn.add_done_callback(lambda _: turns.discard((history, turn)))
        turn.add_done_callback(lambda _: chunks.put(None))
        st.write_stream(iter(chunks.get, None))
        turn.result()
    st.rerun()
