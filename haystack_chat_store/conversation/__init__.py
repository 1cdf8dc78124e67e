# SPDX-License-Identifier: Apache-2.0
"""
The rules of conversations, as pure functions over lists of messages, without any database.

ARCHITECTURE.md lists the modules. `shown` puts together what a model is shown, with the help of most of the others.
"""
