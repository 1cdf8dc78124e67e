# SPDX-License-Identifier: Apache-2.0
"""
Writes the databases of the command line tool `llm` that test_import_programs.py reads, by llm itself.

It changed its tables in version 0.36. Run this once with each:

    pip install llm==0.27.1 httpx && python tests/data/write_llm.py llm_0_27.sqlite
    pip install llm==0.36 && python tests/data/write_llm.py llm_0_36.sqlite
"""

import base64
import sys
from pathlib import Path

import llm
import sqlite_utils
from llm.migrations import migrate

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Scripted(llm.Model):
    """Says what it is told to, and calls a tool if it is asked for the weather."""

    model_id = "scripted"
    supports_tools = True
    attachment_types = frozenset({"image/png", "text/plain"})

    def __init__(self, *replies):
        self.replies = list(replies)

    def execute(self, prompt, stream, response, conversation):
        reply = self.replies.pop(0)
        if isinstance(reply, llm.ToolCall):
            response.add_tool_call(reply)
            return
        response.set_usage(input=5, output=7)
        yield reply


def weather(city: str) -> str:
    return "22 °C"


def ask(db, conversation, question, **options):
    response = conversation.prompt(question, **options)
    response.text()
    response.log_to_db(db)
    return response


def write(path):
    path.unlink(missing_ok=True)
    db = sqlite_utils.Database(path)
    migrate(db)
    call = llm.ToolCall(name="weather", arguments={"city": "Zürich"}, tool_call_id="call_1")
    model = Scripted("Hello!", call, "It is 22 °C.", "A dot.", "Long.")
    talk = model.conversation(tools=[llm.Tool.function(weather)])
    ask(db, talk, "Hi 👋", system="Be kind.")
    asked = ask(db, talk, "What is the weather in Zürich?", system="Be kind.")
    ask(db, talk, "", system="Be kind.", tool_results=asked.execute_tool_calls())
    picture = llm.Attachment(type="image/png", content=base64.b64decode(PNG))
    linked = llm.Attachment(type="image/png", url="https://example.com/a.png")
    ask(db, talk, "What is this?", system="Be kind.", attachments=[picture, linked])
    ask(db, talk, "How long is it?", system="Be kind.", fragments=["A fragment.\n"])

    other = Scripted("Hello, too!").conversation()
    ask(db, other, "Another one")
    if "threads" in db.table_names():  # the same question, answered again: a branch
        again = Scripted("Hello again!").conversation()
        again.id = other.id
        ask(db, again, "Another one")
    db.conn.commit()
    for statement in ("PRAGMA journal_mode = DELETE", "PRAGMA page_size = 512", "VACUUM"):  # a small file
        db.conn.execute(statement)
    db.conn.close()


write(Path(__file__).parent / sys.argv[1])
