# SPDX-License-Identifier: Apache-2.0
"""
The rules of conversations, as pure functions over lists of messages, without any database.

- `rounds`: rounds, windows of a history, and which question a message belongs to.
- `transcripts`: what a transcript that a client sends whole means for a history.
- `tool_calls`: which result answers which tool call.
- `provider_content`: what Haystack's chat generators keep in messages for their own provider.
- `shown`: the messages that a model is shown.
"""
