"""Loss, optimizer, schedule and teacher of a run of timm's script, as tables of a spec."""

import math
from typing import Any

from graphopt.timm_args.arguments import Arguments

Table = dict[str, Any]

#: schedules of timm that repeat in cycles
_CYCLIC = ("cosine", "tanh", "poly")
_SCHEDULES = (*_CYCLIC, "step", "multistep", "constant", "wsd", "rsqrt")
#: what timm's factory takes where the script says nothing
_FACTORY = {"cycle_mul": 1.0, "cycle_decay": 0.1, "cycle_limit": 1, "k_decay": 1.0}


def loss_table(of: Arguments) -> Table:
    """The keys of `[train]` that make the criterion.

    With neither smoothing nor mixup, timm's script takes cross-entropy, whatever bce_loss says.
    """
    table: Table = {"label_smoothing": of["smoothing"]}
    mixed = of["mixup"] > 0 or of["cutmix"] > 0 or of["cutmix_minmax"] is not None
    if of["bce_loss"] and (mixed or of["smoothing"]):
        options = {"target_threshold": of["bce_target_thresh"], "sum": of["bce_sum"], "pos_weight": of["bce_pos_weight"]}
        return table | {"loss": {"name": "bce", **{key: value for key, value in options.items() if value is not None}}}
    of.note("bce_loss", "bce_target_thresh", "bce_sum", "bce_pos_weight")
    return table


def optimizer_table(of: Arguments, batch: int) -> Table:
    """`[train.optimizer]`, for steps of `batch` samples on all ranks."""
    table: Table = {"name": of["opt"].lower(), "lr": _rate(of, batch), "momentum": of["momentum"], "weight_decay": of["weight_decay"]}
    if of["layer_decay"] is not None:
        table |= {"layer_decay": of["layer_decay"], "layer_decay_min": of["layer_decay_min_scale"]}
    else:
        of.note("layer_decay_min_scale")
    own = {"eps": of["opt_eps"], "betas": of["opt_betas"], "foreach": of["opt_foreach"]}
    return table | {"arguments": {key: value for key, value in own.items() if value is not None} | of["opt_args"] | of["opt_kwargs"]}


def _rate(of: Arguments, batch: int) -> float:
    """The peak learning rate: given, or for this batch, from that of a batch of lr_base_size."""
    if of["lr"]:
        of.note("lr_base", "lr_base_size", "lr_base_scale")
        return float(of["lr"])
    ratio = batch / of["lr_base_size"]
    if of["lr_base_scale"] not in ("", "linear", "sqrt"):
        of.refuse("lr_base_scale")
    scale = of["lr_base_scale"] or ("sqrt" if any(part in of["opt"].lower() for part in ("ada", "lamb")) else "linear")
    return float(of["lr_base"] * (math.sqrt(ratio) if scale == "sqrt" else ratio))


def schedule_table(of: Arguments) -> tuple[Table, int]:
    """`[train.scheduler]`, and the epochs of the run, with those that cycles, warm-up and cooldown add to the schedule's own."""
    name = "constant" if of["sched"] == "none" else of["sched"]
    if name not in _SCHEDULES:
        of.refuse("sched", None if name == "plateau" else f"schedules are {', '.join(_SCHEDULES)}")
    table: Table = {"name": name, "on_updates": of["sched_on_updates"], "min_lr": of["min_lr"]}
    if of["sched"] != "none":
        table |= of.chosen("warmup_epochs", "warmup_lr", "warmup_prefix")
    else:
        of.note("warmup_epochs", "warmup_lr", why="not of sched = none")
    table |= _decay(of, name)
    table["arguments"] = _noise(of) | _cycles(of, name)
    total = _epochs(of, name)
    if total != of["epochs"]:
        table["epochs"] = of["epochs"]
    return table, total


def _decay(of: Arguments, name: str) -> Table:
    """When and how fast the rate falls, of schedules that say so."""
    uses = {
        "decay_epochs": name in ("step", "wsd", "rsqrt"),
        "decay_milestones": name == "multistep",
        "decay_rate": name in ("step", "multistep", "poly"),
    }
    for key, used in uses.items():
        if not used:
            of.note(key, why=f"not of sched = {name}")
    return {key: of[key] for key, used in uses.items() if used and of[key] is not None}


def _noise(of: Arguments) -> Table:
    if of["lr_noise"] is None:
        of.note("lr_noise_pct", "lr_noise_std")
        return {}
    noise = of["lr_noise"] if len(of["lr_noise"]) > 1 else of["lr_noise"][0]
    return {"noise": noise, "noise_pct": of["lr_noise_pct"], "noise_std": of["lr_noise_std"], "noise_seed": of["seed"]}


def _cycles(of: Arguments, name: str) -> Table:
    """Further arguments of timm's factory, where they differ from what it takes by itself and the schedule reads them."""
    read = {"cycle_limit", "k_decay"} if name in _CYCLIC else set()
    if name in _CYCLIC and of["lr_cycle_limit"] > 1:
        read |= {"cycle_mul", "cycle_decay"}
    table: Table = {}
    for key, default in _FACTORY.items():
        if key not in read:
            of.note(f"lr_{key}", why="" if name in _CYCLIC else f"not of sched = {name}")
        elif of[f"lr_{key}"] != default:
            table[key] = of[f"lr_{key}"]
    for key in ("decay_fn", "stable_timescale"):
        if name not in ("wsd", "rsqrt"):
            of.note(f"lr_{key}", why=f"not of sched = {name}")
        elif of[f"lr_{key}"] is not None:
            table[key] = of[f"lr_{key}"]
    return table


def _epochs(of: Arguments, name: str) -> int:
    """Epochs of the run: those of the schedule, as timm counts them."""
    epochs, warmup, prefix, cycles = of["epochs"], of["warmup_epochs"], of["warmup_prefix"], max(1, of["lr_cycle_limit"])
    if of["sched"] == "none" or name not in (*_CYCLIC, "wsd", "rsqrt"):
        of.note("cooldown_epochs", why=f"not of sched = {of['sched']}")
        return int(epochs + (warmup if prefix else 0))
    factor = of["lr_cycle_mul"]
    if name in _CYCLIC:
        epochs = epochs * cycles if factor == 1 else math.floor(-epochs * (factor**cycles - 1) / (1 - factor))
    return int(epochs + (warmup if prefix else 0) + of["cooldown_epochs"])


def distill_table(of: Arguments, teacher: str | None) -> Table:
    """`[train.distill]`, empty without a teacher."""
    names = ("distill_loss_weight", "task_loss_weight", "kd_temperature", "kd_distill_type")
    if not of["kd_model_name"]:
        of.note(*names)
        return {}
    if of["kd_distill_type"] != "logit":
        of.refuse("kd_distill_type")
    if teacher is None:
        of.refuse("kd_model_name", fix="Name the file of its weights: --teacher FILE")
    task, weight = of["task_loss_weight"], of["distill_loss_weight"]
    if weight is None:  # the rest of one, where only the other is given
        weight = 1.0 if task is None else 1.0 - task
    table = {"source": "timm", "name": of["kd_model_name"], "weights": teacher or "", "temperature": of["kd_temperature"]}
    return table | {"weight": weight, "task_weight": 1.0 if task is None else task}
