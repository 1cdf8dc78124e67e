# SPDX-License-Identifier: Apache-2.0
"""
Runs one turn of a pipeline in a YAML file. Run it twice: the second run remembers the first.

    python examples/run_yaml_pipeline.py "Hello, I am Ada."
    python examples/run_yaml_pipeline.py --file agent_pipeline.yaml "How much is pi?"
    python examples/run_yaml_pipeline.py --file rag_pipeline.yaml "When does the palace in Kyoto open?"
    python examples/run_yaml_pipeline.py --request-id 1 "Hello?"     run it twice: it is asked once, and answered twice
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

from haystack import Document, Pipeline
from haystack.document_stores.types import DuplicatePolicy

parser = argparse.ArgumentParser(description="Runs one turn of a pipeline in a YAML file.")
parser.add_argument("--file", type=Path, default="chat_pipeline.yaml", help="here or beside this script (%(default)s)")
parser.add_argument("--request-id", help="a request that is sent again with the same id is answered once")
parser.add_argument("--document", action="append", help="a text to answer from, with RAG; can be repeated")
parser.add_argument("question", nargs="*", default=["Hello!"])
options = parser.parse_args()
file = options.file if options.file.exists() else Path(__file__).with_name(options.file.name)
if not file.exists():
    parser.error(f"There is no {options.file}.")

pipeline = Pipeline.loads(file.read_text(encoding="utf-8"))
if "documents" in pipeline.graph.nodes:  # RAG: these are the documents that the model answers from
    texts = options.document or ["The palace in Kyoto opens at nine.", "In Oslo one needs a coat."]
    retriever: Any = pipeline.get_component("documents")
    retriever.document_store.write_documents([Document(content=text) for text in texts], policy=DuplicatePolicy.SKIP)
data = {"query": " ".join(options.question), "chat_history_id": file.stem}
if options.request_id is not None:
    data["request_id"] = options.request_id

# What the model sees is what the component before it passes on: the retriever, or with RAG the prompt builder.
before_model = {sender: edge["from_socket"].name for sender, _, edge in pipeline.graph.in_edges("llm", data=True)}
results = pipeline.run(data, include_outputs_from=set(before_model))
if "agent" in results:
    *seen, answer = results["agent"]["messages"]
else:
    # If the question was answered before, the model is not asked and sees nothing.
    seen = [message for sender, output in before_model.items() for message in results.get(sender, {}).get(output, [])]
    answer = results["answer_writer"]["replies"][-1]
print("What the model saw:" if seen else "The model was not asked.")
for message in seen:
    calls = ", ".join(call.tool_name for call in message.tool_calls)
    content = (message.text or calls or message.tool_call_result.result).replace("\n", "\n" + " " * 13)
    print(f"  {message.role.value:>9}: {content}")
print(f"It answered: {answer.text}" if seen else f"The stored answer: {answer.text}")
if "answer_writer" in results:
    print(f"Messages written with the answer: {results['answer_writer']['messages_written']}")
