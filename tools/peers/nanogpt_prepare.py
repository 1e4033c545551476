"""Prepare text files in the steps of nanoGPT's data/openwebtext/prepare.py.

python nanogpt_prepare.py WORKERS OUT FILE ...
"""

import sys

import datasets
import numpy as np
import tiktoken

encoding = tiktoken.get_encoding("r50k_base")


def process(row: dict) -> dict:
    ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
    return {"ids": ids, "length": len(ids)}


if __name__ == "__main__":
    workers, out, *files = sys.argv[1:]
    rows = datasets.load_dataset("text", data_files=files, sample_by="document", split="train")
    rows = rows.map(process, remove_columns=["text"], num_proc=int(workers))
    ids = np.memmap(out, dtype=np.uint16, mode="w+", shape=(sum(rows["length"]),))
    done = 0
    shards = min(16, len(rows))
    for number in range(shards):
        shard = rows.shard(shards, number, contiguous=True).with_format("numpy")
        batch = np.concatenate(shard["ids"])
        ids[done : done + len(batch)] = batch
        done += len(batch)
    ids.flush()
