# SPDX-License-Identifier: Apache-2.0
from .chat_history_titler import ChatHistoryTitler

__all__ = ["ChatHistoryTitler"]
