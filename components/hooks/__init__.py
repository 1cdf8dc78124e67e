# SPDX-License-Identifier: Apache-2.0
from .chat_history_hooks import chat_history_hooks
from .loader import ChatHistoryLoader
from .saver import ChatHistorySaver

__all__ = ["ChatHistoryLoader", "ChatHistorySaver", "chat_history_hooks"]
