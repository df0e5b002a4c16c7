"""What idea pools are worth: the same collection with ideas and without, an agent fine-tuned on each, side by side.

    python benchmarks/exploration.py --config configs/micro.yaml
    python benchmarks/exploration.py --config configs/tiny.yaml --collect trajectories=40 --sft max_updates=300

Runs collect.py and train_sft.py twice each (runs/NAME-with, runs/NAME-without; each resumes where it stopped), then
diversity.py on the two files of trajectories and the two fine-tuned agents. Writes runs/NAME-exploration.{json,md}.

Without ideas an LLM expert is left to itself; the scripted expert always takes the first idea of an axis, so that its
comparison shows what the measures and the fine-tuning do with little and with much variety, not what an LLM would do.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *args: str) -> None:
    command = [sys.executable, str(ROOT / script), *args]
    print("+", script, *args, flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--collect", nargs="*", default=[], metavar="KEY=VALUE", help="for collect.py")
    parser.add_argument("--sft", nargs="*", default=[], metavar="KEY=VALUE", help="for train_sft.py")
    parser.add_argument("--diversity", nargs="*", default=[], metavar="KEY=VALUE", help="for diversity.py")
    args = parser.parse_args()
    sections = yaml.safe_load(Path(args.config).read_text())
    name = sections.get("common", {}).get("run") or sections["collect"]["run"]
    source = sections.get("collect", {}).get("ideas_from", "task")
    if source == "run":
        shutil.copytree(f"runs/{name}/ideas", f"runs/{name}-with/ideas", dirs_exist_ok=True)
    sources = []
    for kind, ideas_from in (("with", source), ("without", "none")):
        base = ["--config", args.config, f"run={name}-{kind}"]
        run("collect.py", *base, f"ideas_from={ideas_from}", *args.collect)
        run("train_sft.py", *base, *args.sft)
        sources.append((f"runs/{name}-{kind}/data/trajectories.jsonl", f"runs/{name}-{kind}/sft"))
    paths = [path for pair in zip(*sources) for path in pair]
    run("diversity.py", *paths, f"out=runs/{name}-exploration", *args.diversity)


if __name__ == "__main__":
    main()
