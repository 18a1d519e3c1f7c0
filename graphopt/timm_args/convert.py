"""The arguments of a run of timm's script as a spec: the same data, network, optimizer, schedule, loss and augmentation."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from graphopt.errors import BackboneError, SpecError
from graphopt.models.catalog import check_name, default_input, preparation
from graphopt.spec import Spec, from_table
from graphopt.spec.messages import joined
from graphopt.spec.writing import dumps_table
from graphopt.timm_args.arguments import Arguments
from graphopt.timm_args.training import distill_table, loss_table, optimizer_table, schedule_table

Table = dict[str, Any]

#: options that a function here decides on, although they set no key
_DECIDED = ("dist_bn", "input_img_mode", "eval_metric", "amp_impl", "model_dtype", "kd_distill_type")
_MIXING = ("mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_off_epoch")
#: what no_aug turns off
_AUGMENTING: tuple[str, ...] = (
    "train_crop_mode",
    "scale",
    "ratio",
    "hflip",
    "vflip",
    "color_jitter",
    "color_jitter_prob",
    "grayscale_prob",
)
_AUGMENTING += ("gaussian_blur_prob", "aa", "reprob", "remode", "recount", "train_interpolation")
#: timm's names of data sets, after `torch/`
_TORCH_DATA = {name: name for name in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "imagenet")}
_TORCH_DATA |= {"image_folder": "folder", "folder": "folder"}


class Converted(NamedTuple):
    """A spec made of arguments.

    Attributes:
        spec: checked. text: the same as TOML, without defaults, and with the notes as comments.
        notes: for each option that is not at its default and has no effect, why.
    """

    spec: Spec
    text: str
    notes: Mapping[str, str]


def read(path: str | Path | None, settings: Iterable[str] = ()) -> dict[str, Any]:
    """The arguments in a YAML file, and those of `settings` (`"lr=0.1"`, values in YAML), which replace them. Raises SpecError."""
    import yaml

    given: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(f"cannot be read: {error.strerror}", where=str(path)) from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            what = "not YAML without Python objects: " + " ".join(str(error).split())
            raise SpecError(what, where=str(path), fix="Give the args.yaml that timm's train.py has written") from error
        if not isinstance(loaded, dict):
            raise SpecError("not a table of options", where=str(path), fix="Give the args.yaml that timm's train.py has written")
        given |= loaded
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise SpecError("expected OPTION=VALUE", where=f"--set {setting}", fix="For example --set lr=0.1")
        try:
            given[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SpecError("the value is not YAML", where=f"--set {setting}") from error
    return given


def convert(given: Mapping[str, Any], *, ranks: int = 1, teacher: str | None = None) -> Converted:
    """The spec of a run with these arguments.

    Args:
        given: values by the names of options in args.yaml; the others have the script's defaults.
        ranks: processes of the run, which the script multiplies its batch by.
        teacher: weights file of the teacher of a distillation.

    Raises SpecError, for all of them together: options that are refused, values of the wrong kind, names that are no options.
    """
    of = Arguments(given)
    of.settle(_DECIDED)
    table: Table = {}
    if of["experiment"]:
        table["name"] = of["experiment"]
    table["backbone"] = _backbone(of)
    if of["grad_checkpointing"]:
        table["pass"] = [{"use": "checkpoint", "segments": "every block"}]
    table["data"] = _data(of, ranks)
    table["train"] = _train(of, ranks) | _amp(of) | _averages(of, ranks) | loss_table(of)
    table["train"]["optimizer"] = optimizer_table(of, table["train"]["batch"])
    schedule, table["train"]["epochs"] = schedule_table(of)
    table["train"]["scheduler"] = schedule
    if distill := distill_table(of, teacher):
        known = preparation(distill["name"])
        given = {key: value for key, value in table["backbone"]["arguments"].items() if key in ("num_classes", "in_chans")}
        table["train"]["distill"] = distill | {"arguments": given, "mean": list(known.mean), "std": list(known.std)}
    if of.mistakes:
        raise joined(of.mistakes)
    spec = from_table(table, file="the spec of these options")
    return Converted(spec, _text(table, of.notes), of.notes)


# ---- the network


def _backbone(of: Arguments) -> Table:
    name = of["model"]
    table: Table = {"source": "timm", "name": name}
    try:
        check_name("timm", name)
        shape = list(default_input("timm", name, {}) or (3, 224, 224))
    except BackboneError as error:
        of.mistakes.append(SpecError(error.what, where="model", fix=error.fix))
        shape = [3, 224, 224]
    shape = _shape(of, shape)
    given = {"num_classes": of["num_classes"], "global_pool": of["gp"], "drop_rate": of["drop"], "drop_path_rate": of["drop_path"]}
    given |= {"drop_block_rate": of["drop_block"], "bn_momentum": of["bn_momentum"], "bn_eps": of["bn_eps"]}
    given["in_chans"] = shape[0] if shape[0] != 3 else None
    table["arguments"] = {key: value for key, value in given.items() if value is not None} | of["model_kwargs"]
    table["input"] = shape
    if weights := _weights(of, name):
        table["weights"] = weights
    head = {"scale": of["head_init_scale"], "bias": of["head_init_bias"]}
    if any(value is not None for value in head.values()):
        table["head_init"] = {key: value for key, value in head.items() if value is not None}
    return table


def _shape(of: Arguments, own: list[int]) -> list[int]:
    """The shape of one sample: input_size, else img_size, else the network's own."""
    if of["input_size"] is not None:
        of.note("img_size", "in_chans")
        if len(of["input_size"]) != 3:
            of.refuse("input_size", "expected channels, height and width")
        return list(of["input_size"])
    channels = own[0] if of["in_chans"] is None else of["in_chans"]
    side = of["img_size"]
    return [channels, side, side] if side is not None else [channels, *own[1:]]


def _weights(of: Arguments, name: str) -> Any:
    """The weights that the network begins with; a checkpoint replaces the pretrained ones."""
    path, checkpoint = of["pretrained_path"], of["initial_checkpoint"]
    if of["pretrained"] and not path and not checkpoint:
        of.refuse("pretrained", fix="Save the weights to a file: --set pretrained_path=FILE. Or begin anew: --set pretrained=false")
    if path and (checkpoint or not of["pretrained"]):
        of.note("pretrained_path")
    if checkpoint:
        of.note("pretrained", why="initial_checkpoint replaces all weights")
        return checkpoint
    if of["pretrained"] and path:
        reset = list(preparation(name).classifier)  # timm's script gives it a new head, whatever the number of classes
        return {"file": path, "reset": reset}
    return None


# ---- the images


def _data(of: Arguments, ranks: int) -> Table:
    ready = preparation(of["model"])
    table: Table = {"name": _data_name(of)}
    if root := of["data_dir"] or of["data"]:
        table["root"] = root
    if of["data_dir"]:
        of.note("data")
    for option, key in (("train_split", "train_split"), ("val_split", "eval_split")):
        split = of[option]
        if not split or any(sign in split for sign in "[]{}/:") or split.endswith(".tar"):
            of.refuse(option)
        table[key] = split
    table |= {"mean": of["mean"] or list(ready.mean), "std": of["std"] or list(ready.std)}
    table |= {"interpolation": of["interpolation"] or ready.interpolation, "crop_pct": of["crop_pct"] or ready.crop_pct}
    channels = _shape(of, [3])[0]
    if of["input_img_mode"] not in (None, "RGB" if channels == 3 else "L"):
        of.refuse("input_img_mode")
    return table | {"workers": of["workers"], "augment": _augment(of, ranks)}


def _data_name(of: Arguments) -> str:
    kind, slash, rest = of["dataset"].partition("/")
    kind = kind.lower() if slash else ""
    if kind == "wds":
        return "webdataset"
    if kind == "torch" and (known := _TORCH_DATA.get(rest.lower())):
        return known
    if kind == "hfds" and os.path.isdir(of["data_dir"] or of["data"] or ""):
        return "arrow"
    if of["dataset"]:
        reasons = {"hfds": "data_dir is no folder that save_to_disk has written", "torch": "there is no reader for it"}
        of.refuse("dataset", reasons.get(kind), "Save the images in folders, in tar shards (wds/), or with save_to_disk (hfds/)")
    return "folder"


def _augment(of: Arguments, ranks: int) -> Table:
    table: Table = {}
    names: dict[str, str] = {}
    repeats = of["aug_repeats"]
    if ranks == 1 or of["no_aug"]:  # the script repeats images on several ranks only
        of.note("aug_repeats")
    elif repeats:
        if repeats != int(repeats):
            of.refuse("aug_repeats")
        table["repeats"] = int(repeats)
    if of["no_aug"]:
        table["crop"] = "squash"
        of.note(*_AUGMENTING, why="with no_aug")
    else:
        names = {
            "grayscale_prob": "grayscale",
            "gaussian_blur_prob": "blur",
            "aa": "auto_augment",
            "color_jitter_prob": "color_jitter_prob",
        }
        names |= {"reprob": "erase", "remode": "erase_mode", "recount": "erase_count", "train_interpolation": "interpolation"}
        names |= {name: name for name in ("scale", "ratio", "hflip", "vflip", "color_jitter")}
        if (crop := of["train_crop_mode"] or "rrc") not in ("rrc", "rkrc", "rkrr"):
            of.refuse("train_crop_mode")
        table["crop"] = "resized" if crop == "rrc" else crop
        table |= {ours: value for theirs, ours in names.items() if (value := of[theirs]) not in (None, "")}
    if of["mixup"] > 0 or of["cutmix"] > 0 or of["cutmix_minmax"] is not None:
        if of["mixup_mode"] == "half":
            of.refuse("mixup_mode")
        return table | of.chosen("mixup", "cutmix", "cutmix_minmax", *_MIXING)
    of.note(*_MIXING)
    return table


# ---- the run


def _train(of: Arguments, ranks: int) -> Table:
    accumulate = max(1, of["grad_accum_steps"])
    table: Table = {"batch": of["batch_size"] * ranks * accumulate, "accumulate": accumulate, "seed": of["seed"]}
    if of["clip_grad"] is not None:
        table |= {"clip": of["clip_grad"], "clip_mode": of["clip_mode"]}
    else:
        of.note("clip_mode")
    table |= {
        "channels_last": of["channels_last"],
        "device": _device(of),
        "log_every": of["log_interval"],
        "eval_every": of["val_interval"],
    }
    table["keep"] = of["checkpoint_hist"]
    if of["recovery_interval"]:
        table["checkpoint_steps"] = of["recovery_interval"]
    if of["torchcompile"]:
        if of["torchcompile"] != "inductor":
            of.refuse("torchcompile")
        table["compile"] = True
    if of["eval_metric"] != "top1":
        of.refuse("eval_metric")
    return table


def _device(of: Arguments) -> str:
    device: str = of["device"]
    if device.partition(":")[0] not in ("cpu", "cuda"):
        of.refuse("device", fix="Use --set device=cuda")
    return "auto" if device == "cuda" else device


def _amp(of: Arguments) -> Table:
    if of["model_dtype"] not in (None, "float32"):
        of.refuse("model_dtype")
    if of["amp_impl"] not in ("native", ""):
        of.refuse("amp_impl")
    if of["amp"]:
        of.note("native_amp")
    if of["amp"] or of["native_amp"]:
        return {"amp": of["amp_dtype"]}
    of.note("amp_dtype")
    return {}


def _averages(of: Arguments, ranks: int) -> Table:
    table: Table = {"sync_norm": of["sync_bn"]}
    if of["dist_bn"] != "reduce" and ranks > 1 and not of["sync_bn"]:
        of.refuse("dist_bn")
    else:
        of.note("dist_bn")
    if of["model_ema"]:
        return table | {"ema": of["model_ema_decay"], "ema_warmup": of["model_ema_warmup"]}
    of.note("model_ema_decay", "model_ema_warmup")
    return table


# ---- as text


def _text(table: Table, notes: Mapping[str, str]) -> str:
    """The table as TOML without what is default anyway; the notes stand above it."""
    plain = {"backbone": {key: table["backbone"][key] for key in ("source", "name", "input")}}
    short = _without(table, from_table(plain).resolved())
    short["backbone"] = {"source": "timm", "name": table["backbone"]["name"], **short["backbone"], "input": table["backbone"]["input"]}
    short["data"] = {"name": table["data"]["name"], **short.get("data", {})}
    lines = ["From the options of a run of timm's train.py, by `graphopt import`."]
    lines += [f"{name}: {why}" for name, why in notes.items()]
    return "".join(f"# {line}\n" for line in lines) + "\n" + dumps_table(short)


def _without(table: Mapping[str, Any], defaults: Mapping[str, Any]) -> Table:
    found: Table = {}
    for key, value in table.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            if inner := _without(value, default):
                found[key] = inner
        elif value != default:
            found[key] = value
    return found
