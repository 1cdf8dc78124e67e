# SPDX-License-Identifier: Apache-2.0
"""
What each provider answers, and what the receiving side of its Haystack generator makes of it.

The answers have the form of the provider's documentation, as objects of its SDK. The generator's own functions turn
them into messages: the same ones that its `run` calls, for answers that are streamed and for those that are not.
"""

from receiving_anthropic import from_anthropic, from_bedrock
from receiving_openai import from_mistral, from_openai, from_openrouter
from receiving_others import from_cohere, from_gemini, from_ollama
from receiving_responses import from_responses

#: Returns the message that a provider's generator makes of a reply, by the provider.
RECEIVE = {
    "openai": from_openai,
    "responses": from_responses,
    "anthropic": from_anthropic,
    "gemini": from_gemini,
    "bedrock": from_bedrock,
    "mistral": from_mistral,
    "cohere": from_cohere,
    "ollama": from_ollama,
    "openrouter": from_openrouter,
}
