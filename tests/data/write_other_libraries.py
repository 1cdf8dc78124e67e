# SPDX-License-Identifier: Apache-2.0
"""
Writes the databases of other libraries that test_importers.py reads, by these libraries themselves:

    pip install openai-agents langchain-community llama-index-storage-chat-store-sqlite
    python tests/data/write_other_libraries.py

They are kept, for to install the libraries takes longer and needs more than all other tests together.
"""

import asyncio
from pathlib import Path

from agents import SQLiteSession
from agents.extensions.memory import AdvancedSQLiteSession
from langchain_community.chat_message_histories import SQLChatMessageHistory
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages import ChatMessage as LangChainMessage
from llama_index.core.base.llms.types import ThinkingBlock, ToolCallBlock
from llama_index.core.llms import AudioBlock, ChatMessage, DocumentBlock, ImageBlock, MessageRole, TextBlock
from llama_index.core.storage.chat_store import SimpleChatStore
from llama_index.storage.chat_store.sqlite import SQLiteChatStore
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputRefusal,
    ResponseOutputText,
    ResponseReasoningItem,
)
from openai.types.responses.response_reasoning_item import Summary

FOLDER = Path(__file__).parent
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PDF = "JVBERi0xLjQKJSVFT0Y="


def database(name):
    path = FOLDER / name
    path.unlink(missing_ok=True)
    return path


def said(text, identifier):
    content = [ResponseOutputText(annotations=[], text=text, type="output_text", logprobs=[])]
    return ResponseOutputMessage(
        id=identifier, content=content, role="assistant", status="completed", type="message"
    ).model_dump()


async def openai_agents(path):
    session = SQLiteSession("user_456", path)
    call = ResponseFunctionToolCall(
        arguments='{"city":"Zürich"}', call_id="call_1", name="weather", type="function_call", id="fc_1"
    )
    reasoning = ResponseReasoningItem(
        id="rs_1", summary=[Summary(text="I look it up.", type="summary_text")], type="reasoning"
    )
    refusal = ResponseOutputMessage(
        id="msg_2",
        content=[ResponseOutputRefusal(refusal="I cannot do that.", type="refusal")],
        role="assistant",
        status="completed",
        type="message",
    )
    await session.add_items(
        [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "What is the weather in Zürich? 👋"},
            reasoning.model_dump(exclude_unset=True),
            call.model_dump(exclude_unset=True),
            {"type": "function_call_output", "call_id": "call_1", "output": "22 °C"},
            said("It is 22 °C.", "msg_1"),
        ]
    )
    await session.add_items(
        [
            {
                "role": "user",
                "type": "message",
                "content": [
                    {"type": "input_text", "text": "What is this?"},
                    {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "low"},
                    {"type": "input_file", "filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"},
                ],
            },
            refusal.model_dump(),
            {"type": "function_call_output", "call_id": "call_9", "output": [{"type": "input_text", "text": "late"}]},
            {
                "type": "web_search_call",
                "id": "ws_1",
                "status": "completed",
                "action": {"type": "search", "query": "x"},
            },
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "And this?"},
                    {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "auto"},
                ],
            },
        ]
    )
    session.close()
    other = SQLiteSession("another", path)
    await other.add_items([{"role": "user", "content": "Hi"}, said("Hello!", "msg_3")])
    other.close()
    SQLiteSession("empty", path).close()


async def openai_agents_branches(path):
    """A session with a branch of a branch, and one without the tables of branches."""
    session = AdvancedSQLiteSession(session_id="user_456", db_path=path, create_tables=True)
    turns = [("What is a fox?", "An animal."), ("Where does it live?", "In woods."), ("And in winter?", "There, too.")]
    for number, (question, answer) in enumerate(turns):
        await session.add_items([{"role": "user", "content": question}, said(answer, f"msg_{number}")])
    await session.create_branch_from_turn(2, "diet")
    await session.add_items([{"role": "user", "content": "What does it eat?"}, said("Mice.", "msg_10")])
    await session.add_items([{"role": "user", "content": "Only mice?"}, said("Berries, too.", "msg_11")])
    await session.create_branch_from_turn(3, "plants")
    await session.add_items([{"role": "user", "content": "And grass?"}, said("No.", "msg_12")])
    await session.switch_to_branch("main")
    await session.add_items([{"role": "user", "content": "Thanks."}])
    session.close()
    plain = SQLiteSession("plain", path)
    await plain.add_items([{"role": "user", "content": "Hi"}, said("Hello!", "msg_20")])
    plain.close()


def langchain(path):
    history = SQLChatMessageHistory("user_456", connection=f"sqlite:///{path}")
    call = {"name": "weather", "args": {"city": "Zürich"}, "id": "call_1", "type": "tool_call"}
    history.add_messages([
        SystemMessage("Be kind."),
        HumanMessage("What is the weather in Zürich? 👋", name="Ada", id="human-1"),
        AIMessage(
            "Let me look.",
            tool_calls=[call],
            response_metadata={"model_name": "gpt-5", "finish_reason": "tool_calls"},
            usage_metadata={"input_tokens": 5, "output_tokens": 7, "total_tokens": 12},
        ),
        ToolMessage("22 °C", tool_call_id="call_1"),
        AIMessageChunk("It is 22 °C."),
        HumanMessage([
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"}},
            {"type": "image", "source_type": "base64", "data": PNG, "mime_type": "image/png"},
            {"type": "file", "base64": PDF, "mime_type": "application/pdf", "filename": "a.pdf"},
        ]),
        AIMessage([
            {"type": "thinking", "thinking": "A dot.", "signature": "c2ln"},
            {"type": "text", "text": "A dot."},
            {"type": "tool_use", "id": "call_2", "name": "zoom", "input": {"by": 2}},
        ], tool_calls=[{"name": "zoom", "args": {"by": 2}, "id": "call_2", "type": "tool_call"}]),
        ToolMessage("No lens.", tool_call_id="call_2", status="error"),
        FunctionMessage("Old.", name="legacy"),
        LangChainMessage("Custom.", role="assistant"),
        LangChainMessage("Who?", role="narrator"),
        HumanMessage([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]),
    ])  # fmt: skip
    SQLChatMessageHistory("another", connection=f"sqlite:///{path}").add_messages(
        [HumanMessage("Hi"), AIMessage("Hello!")]
    )


def llama_index(*stores):
    call = {"id": "call_2", "type": "function", "function": {"name": "zoom", "arguments": '{"by": 2}'}}
    messages = [
        ChatMessage("Be kind.", role=MessageRole.SYSTEM),
        ChatMessage("What is the weather in Zürich? 👋", role=MessageRole.USER),
        ChatMessage(
            role=MessageRole.ASSISTANT,
            blocks=[
                ThinkingBlock(content="I look it up.", additional_information={"signature": "c2ln"}),
                TextBlock(text="Let me look."),
                ToolCallBlock(tool_call_id="call_1", tool_name="weather", tool_kwargs={"city": "Zürich"}),
            ],
        ),
        ChatMessage("22 °C", role=MessageRole.TOOL, additional_kwargs={"tool_call_id": "call_1", "name": "weather"}),
        ChatMessage("It is 22 °C.", role=MessageRole.ASSISTANT),
        ChatMessage(
            role=MessageRole.USER,
            blocks=[
                TextBlock(text="What is this?"),
                ImageBlock(image=PNG.encode(), image_mimetype="image/png", detail="low"),
                DocumentBlock(data=PDF.encode(), document_mimetype="application/pdf", title="a.pdf"),
            ],
        ),
        ChatMessage("A dot.", role=MessageRole.ASSISTANT, additional_kwargs={"tool_calls": [call]}),
        ChatMessage("No lens.", role=MessageRole.TOOL, additional_kwargs={"tool_call_id": "call_2"}),
        ChatMessage(
            role=MessageRole.USER, blocks=[TextBlock(text="Listen."), AudioBlock(audio=b"UklGRg==", format="wav")]
        ),
        ChatMessage("Bot.", role=MessageRole.CHATBOT),
        ChatMessage("Model.", role=MessageRole.MODEL),
    ]
    for store in stores:
        for message in messages:
            store.add_message("user_456", message)
        store.set_messages("another", [ChatMessage("Hi", role="user"), ChatMessage("Hello!", role="assistant")])


if __name__ == "__main__":
    asyncio.run(openai_agents(database("openai_agents.sqlite")))
    asyncio.run(openai_agents_branches(database("openai_agents_branches.sqlite")))
    langchain(database("langchain.sqlite"))
    simple = SimpleChatStore()
    llama_index(SQLiteChatStore.from_uri(f"sqlite:///{database('llama_index.sqlite')}"), simple)
    simple.persist(str(FOLDER / "llama_index.json"))
