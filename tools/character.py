"""Write made-up conversations with a character: what `make chat` trains on.

    python tools/character.py tools/lighthouse.txt data/lighthouse.jsonl --count=4500

They are sentences with gaps, put together by chance, so that a model of a million parameters can
learn in a minute whom it is to be, what that person knows, and to say so of everything else. For
another character, write another text: tools/lighthouse.txt says how.
"""

import argparse
import json
import random
import re
from pathlib import Path

Topic = tuple[list[str], list[str]]  # questions, and what is answered to any of them


def read_character(text: str) -> tuple[list[Topic], dict[str, list[str]]]:
    """Return the topics of a character, and the words that fill the gaps of sentences."""
    words = re.findall(r"^\$(\w+) = (.*)$", text, re.MULTILINE)
    topics = []
    for block in text.split("\n\n")[1:]:
        lines = block.splitlines()[1:]
        topics.append(tuple([line[2:] for line in lines if line[0] == mark] for mark in "?!"))
    return topics, {name: choices.split(" | ") for name, choices in words}


def said(sentences: list[str], words: dict[str, list[str]], chance: random.Random) -> str:
    """Return one of the sentences, its gaps filled."""
    return re.sub(r"\$(\w+)", lambda gap: chance.choice(words[gap[1]]), chance.choice(sentences))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("character", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4500)
    arguments = parser.parse_args()
    topics, words = read_character(arguments.character.read_text(encoding="utf-8"))
    chance = random.Random(0)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as file:
        for _ in range(arguments.count):
            chosen = topics[:1] if chance.random() < 0.4 else []
            chosen += chance.choices(topics[:-1], k=chance.randint(1, 3))
            chosen += topics[-1:] if chance.random() < 0.3 else []
            messages = [
                {"role": role, "content": said(sentences, words, chance)}
                for topic in chosen
                for role, sentences in zip(("user", "assistant"), topic, strict=True)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
