"""Hyperparameter search with Ray Tune: each trial is a run of dngd.Trainer that is stopped when others do better.

    python examples/tune.py                             # a local Ray, or the one of $RAY_ADDRESS
    python examples/tune.py --trials 20 --dataset cora --data-root DATA --split public

Trials are chosen by the validation metric; the test metric of the best one is printed once, at the end.
"""

import argparse
import os

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

import dngd


class Report(dngd.Callback):
    """Tells Ray Tune of each evaluation; it may end the trial in reply."""

    def on_evaluation(self, run, record):
        tune.report({"val": record.val_accuracy, "test": record.test_accuracy, "epoch": record.epoch})


def trial(chosen, fields):
    """Train one configuration; its run folder is the trial's own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    config = dngd.TrainConfig(
        **fields,
        engine="local",
        lr=chosen["lr"],
        weight_decay=chosen["weight_decay"],
        kfac={"damping": chosen["damping"]},
        run_dir=os.path.join(tune.get_context().get_trial_dir(), "run"),
    )
    dngd.Trainer(config, callbacks=[Report()], quiet=True).fit()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="products-mini")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--split", default="masks")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--storage", default=os.path.abspath("runs"))
    arguments = parser.parse_args()
    fields = {name: getattr(arguments, name) for name in ("dataset", "data_root", "split", "batch_size", "epochs")}
    # Trials have working directories of their own.
    if os.path.exists(arguments.dataset):
        fields["dataset"] = os.path.abspath(arguments.dataset)
    if arguments.data_root is not None:
        fields["data_root"] = os.path.abspath(arguments.data_root)
    fields |= {"num_layers": 2, "hidden": 128, "fanout": (10, 10)}

    ray.init(log_to_driver=False, logging_level="ERROR")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, fields=fields), {"cpu": 1}),
        param_space={
            "lr": tune.loguniform(0.02, 0.3),
            "damping": tune.loguniform(1e-3, 1e-1),
            "weight_decay": tune.choice([0.0, 1e-4, 1e-3]),
        },
        tune_config=tune.TuneConfig(
            metric="val", mode="max", num_samples=arguments.trials, scheduler=ASHAScheduler(grace_period=2)
        ),
        run_config=tune.RunConfig(name="dngd-tune", storage_path=arguments.storage, verbose=0),
    )
    results = tuner.fit()
    if results.errors:
        raise SystemExit(f"a trial failed: {results.errors[0]}")
    best = results.get_best_result()
    stopped = sum(result.metrics["epoch"] < arguments.epochs for result in results)
    print(f"{len(results)} trials, {stopped} stopped early")
    print(f"best: val {best.metrics['val']:.4f}, test there {best.metrics['test']:.4f}, {best.config}")


if __name__ == "__main__":
    main()
