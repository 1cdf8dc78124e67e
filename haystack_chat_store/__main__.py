# SPDX-License-Identifier: Apache-2.0
from haystack_chat_store.cli import main

main()
