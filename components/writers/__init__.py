# SPDX-License-Identifier: Apache-2.0
from .chat_message_writer import ChatMessageWriter

__all__ = ["ChatMessageWriter"]
