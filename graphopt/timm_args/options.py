"""The options of timm's training script (`train.py` of pytorch-image-models, 1.0.x), and what becomes of each in a spec.

Every option is mapped to keys of the spec, refused with a reason, or has no effect on a run of graphopt. `graphopt.timm_args.convert` does
what this table says; the documentation shows it.
"""

from typing import Any, Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["text", "integer", "number", "texts", "integers", "numbers", "switch", "table"]


class Option(NamedTuple):
    """One option, by the name that it has in args.yaml.

    Attributes:
        keys: the keys of the spec that it sets, as a spec's user writes them; "" for one that is refused or has no effect.
        refused: why it is refused where it is not at its default; of a mapped one, which values are, and why.
        unused: why it has no effect here; of a mapped one, when it has none.
    """

    name: str
    kind: Kind
    default: Any
    keys: str = ""
    refused: str = ""
    unused: str = ""


_NEVER = "graphopt never downloads"
_SPLITS = "a step takes each image once, not several augmented copies of it"
_SIZES = "the network is traced for one input size"
_NAFLEX = "the network is traced for one input size, not for sequences of patches"
_ALWAYS_FAST = "makes no difference to the result"
_LOGS = "a run's folder has its own record: metrics.jsonl, summary.json, and event files with --tensorboard"
_UNMIXED = "without mixup and cutmix"
_ONLY_SIZES = "only with train_img_sizes"
_ONLY_NAFLEX = "only with naflex_loader"
_ONLY_TEACHER = "only with kd_model_name"

DATA = (
    Option("data", "text", None, "data.root", unused="with data_dir"),
    Option("data_dir", "text", None, "data.root"),
    Option(
        "dataset", "text", "", "data.name", refused=f"tfds/ and hfids/ are streams without a fixed order of samples; hfds/NAME: {_NEVER}"
    ),
    Option("train_split", "text", "train", "data.train_split", refused="a part of a split, and names of shards"),
    Option("val_split", "text", "validation", "data.eval_split", refused="no evaluation; a part of a split, and names of shards"),
    Option("train_num_samples", "integer", None, unused="samples are counted"),
    Option("val_num_samples", "integer", None, unused="samples are counted"),
    Option("dataset_download", "switch", False, refused=_NEVER),
    Option("class_map", "text", "", refused="classes are the folders' names in alphabetical order, or numbers in the data"),
    Option("input_img_mode", "text", None, refused="images are RGB or grey (L), by the channels of the input"),
    Option("input_key", "text", None, refused="images are found by their type"),
    Option("target_key", "text", None, refused="classes are found by their type"),
    Option("dataset_trust_remote_code", "switch", False, unused="no code of a data set is run"),
)

MODEL = (
    Option("model", "text", "resnet50", "backbone.name", refused=f"hf-hub: and local-dir: names: {_NEVER}"),
    Option("pretrained", "switch", False, "backbone.weights", refused=f"without pretrained_path: {_NEVER}"),
    Option("pretrained_path", "text", None, "backbone.weights, with a new head", unused="without pretrained, and with initial_checkpoint"),
    Option("initial_checkpoint", "text", "", "backbone.weights"),
    Option("resume", "text", "", refused="a run goes on from its own checkpoints only (train --resume)"),
    Option("no_resume_opt", "switch", False, unused="only with resume"),
    Option("num_classes", "integer", None, "backbone.arguments.num_classes"),
    Option("gp", "text", None, "backbone.arguments.global_pool"),
    Option("img_size", "integer", None, "backbone.input", unused="with input_size"),
    Option("in_chans", "integer", None, "backbone.input, backbone.arguments.in_chans", unused="with input_size"),
    Option("input_size", "integers", None, "backbone.input, backbone.arguments.in_chans"),
    Option("crop_pct", "number", None, "data.crop_pct"),
    Option("mean", "numbers", None, "data.mean"),
    Option("std", "numbers", None, "data.std"),
    Option("interpolation", "text", "", "data.interpolation"),
    Option("batch_size", "integer", 128, "train.batch, times ranks and grad_accum_steps"),
    Option("validation_batch_size", "integer", None, unused=_ALWAYS_FAST),
    Option("channels_last", "switch", False, "train.channels_last"),
    Option("fuser", "text", "", unused=_ALWAYS_FAST),
    Option("grad_accum_steps", "integer", 1, "train.accumulate"),
    Option("grad_checkpointing", "switch", False, "the pass checkpoint, every block"),
    Option("fast_norm", "switch", False, refused="norms under autocast compute in float32"),
    Option("model_kwargs", "table", {}, "backbone.arguments"),
    Option("head_init_scale", "number", None, "backbone.head_init.scale"),
    Option("head_init_bias", "number", None, "backbone.head_init.bias"),
    Option("torchcompile_mode", "text", None, refused="torch.compile has its default mode here"),
    Option("torchscript", "switch", False, refused="what is trained is a torch.fx module; train.compile makes it fast"),
    Option("torchcompile", "text", None, "train.compile", refused="backends other than inductor"),
    Option("device", "text", "cuda", "train.device", refused="devices other than the CPU and CUDA"),
    Option("amp", "switch", False, "train.amp"),
    Option("amp_dtype", "text", "float16", "train.amp", unused="without amp"),
    Option("model_dtype", "text", None, refused="weights are in float32"),
    Option("no_ddp_bb", "switch", False, unused="buffers are averaged over the ranks at the end of each epoch"),
    Option("synchronize_step", "switch", False, unused=_ALWAYS_FAST),
    Option("local_rank", "integer", 0, unused="the launcher says it"),
    Option("device_modules", "texts", None, refused="code that a spec does not name is not imported"),
)

OPTIMIZER = (
    Option("opt", "text", "sgd", "train.optimizer.name"),
    Option("opt_eps", "number", None, "train.optimizer.arguments.eps"),
    Option("opt_betas", "numbers", None, "train.optimizer.arguments.betas"),
    Option("momentum", "number", 0.9, "train.optimizer.momentum"),
    Option("weight_decay", "number", 2e-5, "train.optimizer.weight_decay"),
    Option("clip_grad", "number", None, "train.clip"),
    Option("clip_mode", "text", "norm", "train.clip_mode", unused="without clip_grad"),
    Option("layer_decay", "number", None, "train.optimizer.layer_decay"),
    Option("layer_decay_min_scale", "number", 0.0, "train.optimizer.layer_decay_min", unused="without layer_decay"),
    Option("layer_decay_no_opt_scale", "number", None, refused="the pass freeze says which layers do not train"),
    Option("opt_foreach", "switch", None, "train.optimizer.arguments.foreach"),
    Option("opt_kwargs", "table", {}, "train.optimizer.arguments"),
)

SCHEDULE = (
    Option(
        "sched", "text", "cosine", "train.scheduler.name", refused="plateau: its rates depend on earlier results, which it does not save"
    ),
    Option("sched_on_updates", "switch", False, "train.scheduler.on_updates"),
    Option("lr", "number", None, "train.optimizer.lr"),
    Option("lr_base", "number", 0.1, "train.optimizer.lr", unused="with lr"),
    Option("lr_base_size", "integer", 256, "train.optimizer.lr", unused="with lr"),
    Option("lr_base_scale", "text", "", "train.optimizer.lr", refused="scales other than linear and sqrt", unused="with lr"),
    Option("lr_noise", "numbers", None, "train.scheduler.arguments.noise"),
    Option("lr_noise_pct", "number", 0.67, "train.scheduler.arguments.noise_pct", unused="without lr_noise"),
    Option("lr_noise_std", "number", 1.0, "train.scheduler.arguments.noise_std", unused="without lr_noise"),
    Option("lr_cycle_mul", "number", 1.0, "train.scheduler.arguments.cycle_mul", unused="with one cycle"),
    Option("lr_cycle_decay", "number", 0.5, "train.scheduler.arguments.cycle_decay", unused="with one cycle"),
    Option("lr_cycle_limit", "integer", 1, "train.scheduler.arguments.cycle_limit, train.epochs"),
    Option("lr_k_decay", "number", 1.0, "train.scheduler.arguments.k_decay"),
    Option("lr_decay_fn", "text", None, "train.scheduler.arguments.decay_fn"),
    Option("lr_stable_timescale", "number", None, "train.scheduler.arguments.stable_timescale"),
    Option("warmup_lr", "number", 1e-5, "train.scheduler.warmup_lr"),
    Option("min_lr", "number", 0.0, "train.scheduler.min_lr"),
    Option("epochs", "integer", 300, "train.epochs, train.scheduler.epochs"),
    Option("epoch_repeats", "number", 0.0, refused="an epoch takes each image once"),
    Option("start_epoch", "integer", None, refused="a run begins at epoch 0, or goes on from its own checkpoint"),
    Option("decay_milestones", "integers", [90, 180, 270], "train.scheduler.decay_milestones", unused="unless sched is multistep"),
    Option("decay_epochs", "number", 90.0, "train.scheduler.decay_epochs", unused="unless sched is step, wsd or rsqrt"),
    Option("warmup_epochs", "integer", 5, "train.scheduler.warmup_epochs"),
    Option("warmup_prefix", "switch", False, "train.scheduler.warmup_prefix, train.epochs"),
    Option("cooldown_epochs", "integer", 0, "train.epochs"),
    Option("patience_epochs", "integer", 10, unused="only of the plateau schedule"),
    Option("decay_rate", "number", 0.1, "train.scheduler.decay_rate"),
)

AUGMENT = (
    Option("no_aug", "switch", False, 'data.augment.crop = "squash", and nothing else'),
    Option("train_crop_mode", "text", None, "data.augment.crop", refused="crops other than rrc, rkrc and rkrr"),
    Option("scale", "numbers", [0.08, 1.0], "data.augment.scale"),
    Option("ratio", "numbers", [0.75, 4 / 3], "data.augment.ratio"),
    Option("hflip", "number", 0.5, "data.augment.hflip"),
    Option("vflip", "number", 0.0, "data.augment.vflip"),
    Option("color_jitter", "number", 0.4, "data.augment.color_jitter"),
    Option("color_jitter_prob", "number", None, "data.augment.color_jitter_prob"),
    Option("grayscale_prob", "number", None, "data.augment.grayscale"),
    Option("gaussian_blur_prob", "number", None, "data.augment.blur"),
    Option("aa", "text", None, "data.augment.auto_augment"),
    Option(
        "aug_repeats",
        "number",
        0.0,
        "data.augment.repeats",
        refused="repeats that are no whole number",
        unused="on one rank, and with no_aug",
    ),
    Option("aug_splits", "integer", 0, refused=_SPLITS),
    Option("jsd_loss", "switch", False, refused=_SPLITS),
    Option("bce_loss", "switch", False, "train.loss.name", unused="without smoothing and mixup, where timm's script takes cross-entropy"),
    Option("bce_sum", "switch", False, "train.loss.sum", unused="without bce_loss"),
    Option("bce_target_thresh", "number", None, "train.loss.target_threshold", unused="without bce_loss"),
    Option("bce_pos_weight", "number", None, "train.loss.pos_weight", unused="without bce_loss"),
    Option("reprob", "number", 0.0, "data.augment.erase"),
    Option("remode", "text", "pixel", "data.augment.erase_mode"),
    Option("recount", "integer", 1, "data.augment.erase_count"),
    Option("resplit", "switch", False, refused="every image of a batch is augmented alike"),
    Option("mixup", "number", 0.0, "data.augment.mixup"),
    Option("cutmix", "number", 0.0, "data.augment.cutmix"),
    Option("cutmix_minmax", "numbers", None, "data.augment.cutmix_minmax"),
    Option("mixup_prob", "number", 1.0, "data.augment.mixup_prob", unused=_UNMIXED),
    Option("mixup_switch_prob", "number", 0.5, "data.augment.mixup_switch_prob", unused=_UNMIXED),
    Option("mixup_mode", "text", "batch", "data.augment.mixup_mode", refused="half: it trains on half of each batch", unused=_UNMIXED),
    Option("mixup_off_epoch", "integer", 0, "data.augment.mixup_off_epoch", unused=_UNMIXED),
    Option("smoothing", "number", 0.1, "train.label_smoothing"),
    Option("train_interpolation", "text", "random", "data.augment.interpolation"),
    Option("drop", "number", 0.0, "backbone.arguments.drop_rate"),
    Option("drop_connect", "number", None, refused="timm's script takes drop_path in its place"),
    Option("drop_path", "number", None, "backbone.arguments.drop_path_rate"),
    Option("drop_block", "number", None, "backbone.arguments.drop_block_rate"),
)

NORMS_AND_AVERAGES = (
    Option("bn_momentum", "number", None, "backbone.arguments.bn_momentum"),
    Option("bn_eps", "number", None, "backbone.arguments.bn_eps"),
    Option("sync_bn", "switch", False, "train.sync_norm"),
    Option("dist_bn", "text", "reduce", refused="on several ranks: statistics are averaged at the end of each epoch", unused="on one rank"),
    Option("split_bn", "switch", False, refused=_SPLITS),
    Option("model_ema", "switch", False, "train.ema"),
    Option("model_ema_force_cpu", "switch", False, unused="averages are held and evaluated on the device"),
    Option("model_ema_decay", "number", 0.9998, "train.ema", unused="without model_ema"),
    Option("model_ema_warmup", "switch", False, "train.ema_warmup", unused="without model_ema"),
)

MISCELLANEOUS = (
    Option("seed", "integer", 42, "train.seed"),
    Option("worker_seeding", "text", "all", unused="what augmentation draws depends on seed, epoch and image, not on processes"),
    Option("log_interval", "integer", 50, "train.log_every"),
    Option("val_interval", "integer", 1, "train.eval_every"),
    Option("recovery_interval", "integer", 0, "train.checkpoint_steps"),
    Option("checkpoint_hist", "integer", 10, "train.keep"),
    Option("workers", "integer", 4, "data.workers"),
    Option("save_images", "switch", False, unused=_LOGS),
    Option("pin_mem", "switch", False, unused="memory is pinned wherever a run trains on CUDA"),
    Option("no_prefetcher", "switch", False, unused=_ALWAYS_FAST),
    Option("output", "text", "", unused="train -o names the folder"),
    Option("experiment", "text", "", "name"),
    Option("eval_metric", "text", "top1", refused="the best checkpoint is the one of the highest top-1 accuracy"),
    Option("tta", "integer", 0, unused="timm's script does not read it in training"),
    Option("use_multi_epochs_loader", "switch", False, unused=_ALWAYS_FAST),
    Option("log_wandb", "switch", False, unused=_LOGS),
    Option("wandb_project", "text", None, unused=_LOGS),
    Option("wandb_tags", "texts", [], unused=_LOGS),
    Option("wandb_resume_id", "text", "", unused=_LOGS),
)

SCHEDULED_SIZES = (
    Option("train_img_sizes", "integers", None, refused=_SIZES),
    Option("train_batch_sizes", "integers", None, unused=_ONLY_SIZES),
    Option("train_size_probs", "numbers", None, unused=_ONLY_SIZES),
    Option("train_size_schedule", "text", "constant", unused=_ONLY_SIZES),
    Option("train_size_schedule_spread", "number", 0.65, unused=_ONLY_SIZES),
    Option("train_size_random_mix", "number", 0.1, unused=_ONLY_SIZES),
    Option("train_batches_per_epoch", "integer", None, refused="an epoch takes each image once"),
    Option("variable_batch_loss_scale", "text", "none", unused=_ONLY_SIZES),
    Option("naflex_loader", "switch", False, refused=_NAFLEX),
    Option("naflex_train_seq_lens", "integers", [128, 256, 576, 784, 1024], unused=_ONLY_NAFLEX),
    Option("naflex_max_seq_len", "integer", 576, unused=_ONLY_NAFLEX),
    Option("naflex_patch_sizes", "integers", None, unused=_ONLY_NAFLEX),
    Option("naflex_patch_size_probs", "numbers", None, unused=_ONLY_NAFLEX),
    Option("naflex_loss_scale", "text", "linear", unused=_ONLY_NAFLEX),
    Option("naflex_patchify_channels_first", "switch", False, unused=_ONLY_NAFLEX),
)

DISTILLATION = (
    Option("kd_model_name", "text", None, "train.distill.name", refused=f"without a file for the teacher's weights (--teacher): {_NEVER}"),
    Option(
        "kd_distill_type",
        "text",
        "logit",
        refused="only outputs are compared: features and distillation tokens are not",
        unused=_ONLY_TEACHER,
    ),
    Option("kd_loss_type", "text", "kl", unused="timm has this one only"),
    Option("distill_loss_weight", "number", None, "train.distill.weight", unused=_ONLY_TEACHER),
    Option("task_loss_weight", "number", None, "train.distill.task_weight, train.distill.weight", unused=_ONLY_TEACHER),
    Option("kd_temperature", "number", 4.0, "train.distill.temperature", unused=_ONLY_TEACHER),
    Option("kd_student_feature_dim", "integer", None, unused="only of features"),
    Option("kd_teacher_feature_dim", "integer", None, unused="only of features"),
    Option("kd_token_distill_type", "text", "soft", unused="only of distillation tokens"),
)

#: of older versions of the script
EARLIER = (
    Option("opt_args", "table", {}, "train.optimizer.arguments"),
    Option("native_amp", "switch", False, "train.amp", unused="with amp"),
    Option("apex_amp", "switch", False, refused="mixed precision is torch's own: native_amp, amp"),
    Option("amp_impl", "text", "native", refused="mixed precision is torch's own"),
    Option("aot_autograd", "switch", False, unused=_ALWAYS_FAST),
)

#: by the groups of the documentation
GROUPS = {
    "Data": DATA,
    "Model": MODEL,
    "Optimizer": OPTIMIZER,
    "Schedule": SCHEDULE,
    "Augmentation and loss": AUGMENT,
    "Norms and averages": NORMS_AND_AVERAGES,
    "The rest": MISCELLANEOUS,
    "Several sizes": SCHEDULED_SIZES,
    "Distillation": DISTILLATION,
    "Earlier versions": EARLIER,
}
OPTIONS = {option.name: option for group in GROUPS.values() for option in group}
