# SPDX-License-Identifier: Apache-2.0
from .chat_message_retriever import ChatMessageRetriever

__all__ = ["ChatMessageRetriever"]
