# SPDX-License-Identifier: Apache-2.0
"""
Runs one turn of the pipeline in chat_pipeline.yaml. Run it twice: the second run still knows the first.

    python examples/run_yaml_pipeline.py "Hello, I am Ada."
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

from haystack import Pipeline

pipeline = Pipeline.loads(Path(__file__).with_name("chat_pipeline.yaml").read_text(encoding="utf-8"))
question = " ".join(sys.argv[1:]) or "Hello!"
results = pipeline.run({"query": question, "chat_history_id": "yaml"}, include_outputs_from={"retriever", "llm"})

print("What the model saw:")
for message in results["retriever"]["messages"]:
    print(f"  {message.role.value:>9}: {message.text}")
print(f"It answered: {results['llm']['replies'][0].text}")
print(f"Messages stored: {results['writer']['messages_written']}")
