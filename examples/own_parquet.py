"""Your own Parquet files, end to end: import, train, predict, and join the predictions back.

    python examples/own_parquet.py                      # makes two small tables in ./own-data and uses them
    python examples/own_parquet.py --folder my-tables   # a folder with nodes*.parquet and edges*.parquet

Columns: `id`, `label` (empty for nodes without one) and numbers as features; `src`, `dst` with ids. Edges are followed
in both directions here (add_reverse). Run again, it imports the tables anew and makes another run folder.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import dngd
from dngd.graph import import_tables


def make_tables(folder, num_people=2000):
    """Write people of three clubs: whom one knows tells the club better than one's own features do."""
    random = np.random.default_rng(0)
    club = random.integers(0, 3, num_people)
    ids = np.array([f"person-{k}" for k in range(num_people)])
    names = np.array(["chess", "rowing", "theatre"])[club]
    known = random.random(num_people) < 0.5
    features = np.eye(3)[club] * 0.5 + random.normal(size=(num_people, 3))
    people = {"id": ids, "label": pa.array(np.where(known, names, None))}
    people |= {f"score_{k}": features[:, k].astype(np.float32) for k in range(3)}
    src = random.integers(0, num_people, 10 * num_people)
    same_club = [np.flatnonzero(club == k) for k in range(3)]
    friend = np.array([random.choice(same_club[club[v]]) for v in src])
    dst = np.where(random.random(len(src)) < 0.7, friend, random.integers(0, num_people, len(src)))
    folder.mkdir()
    pq.write_table(pa.table(people), folder / "nodes.parquet")
    pq.write_table(pa.table({"src": ids[src], "dst": ids[dst]}), folder / "edges.parquet")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("own-data"))
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    folder = arguments.folder
    if not folder.exists():
        make_tables(folder)

    store = import_tables(folder, folder / "graph.store", add_reverse=True, overwrite=True)
    run = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    trainer = dngd.Trainer(
        dngd.TrainConfig(
            dataset=str(store.path),
            split="random:0.6/0.2/0.2",  # of the labelled nodes
            engine="local",
            num_layers=2,
            hidden=64,
            fanout=(10, 10),
            batch_size=256,
            epochs=arguments.epochs,
            metric="macro_f1",
            run_dir=run,
        )
    )
    result = trainer.fit()
    print(f"macro-F1 of nodes held out: {result.test_accuracy:.3f}")

    # In the order of the graph's nodes, which have the names that the table gave them.
    table = trainer.predict_file(run / "predictions.parquet", nodes="unlabelled")
    print(f"predictions: {table.path}")
    found = pq.read_table(table.path)
    print(found.slice(0, 3).to_pandas().to_string(index=False))
    counts = pc.value_counts(found["class_name"]).to_pylist()
    print("predicted:", {row["values"]: row["counts"] for row in counts})


if __name__ == "__main__":
    main()
