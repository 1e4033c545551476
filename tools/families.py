"""Print how far each family is from transformers, in both directions.

For each model: the largest difference of logits, and the share of equal greedy tokens.

    python tools/families.py
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # where the models are that the tests compare

from helpers import FAMILY_NAMES, SHAPES, random_model  # noqa: E402
from test_huggingface import THEIRS, differences, their_model  # noqa: E402

from plainllama.families import family_of  # noqa: E402
from plainllama.huggingface import load_model, save_model  # noqa: E402


def main() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    print(f"{'model':32s} {'direction':14s} {'logits':>8s}  greedy tokens")
    with tempfile.TemporaryDirectory() as name:
        for shape in FAMILY_NAMES:
            ours, directory = random_model(**SHAPES[shape]), Path(name, f"to {shape}")
            save_model(ours, directory)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
            largest, agreement = differences(ours, theirs)
            label = f"{family_of(ours.config)} ({shape})"
            print(f"{label:32s} {'ours → theirs':14s} {largest:8.1e}  {agreement:.0%} equal")
        for label in THEIRS:
            theirs, directory = their_model(transformers, label), Path(name, f"from {label}")
            theirs.save_pretrained(directory)
            largest, agreement = differences(load_model(directory), theirs)
            print(f"{label:32s} {'theirs → ours':14s} {largest:8.1e}  {agreement:.0%} equal")


if __name__ == "__main__":
    main()
