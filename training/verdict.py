"""What the metrics of a run say in words: whether it learns and, if not, how it fails and what has helped.

The rules look at medians over a window of the last lines, never at one line, and not before warm-up and freeze are
over. One number decides nearly everything: `target_information`, how well the teacher's targets tell the images of a
step apart. It is near 0 in every collapse of the targets, whether their entropy is ln K, 0 or swings between, and was
0.24 nats at least in what learned; features were spread as widely in collapsed runs as in healthy ones. What it does
not tell is how much the features are worth: that takes k-NN.
"""

import math
from dataclasses import dataclass
from statistics import median

from modeling_dino import DINOConfig

from .arguments import TrainingArguments


TOO_EARLY = "too early to tell"
LEARNING = "learning"
STUCK = "stuck at uniform"
COLLAPSING = "collapsing to one output"
DIVERGING = "diverging"
FAILING = (STUCK, COLLAPSING, DIVERGING)

MIN_LINES = 5  # of a window
MIN_IMAGES = 4  # of a step, as fewer may well be alike

# from runs of a few hundred steps on digits, CIFAR-10 and noise; tests/fixtures/verdicts.json has their lines
NO_INFORMATION = 0.1  # nats; failing runs had less than 0.06, most of them less than 0.01
UNIFORM_ENTROPY = 0.95  # over ln K; of those that tell nothing, above 0.96 or anywhere
ONE_HOT_ENTROPY = 0.1  # over ln K; with targets that tell fewer than two answers apart. Healthy: 2.2 nats at 0.10
RUNAWAY_DISTANCE = 1.0  # as far from the teacher as the teacher is from 0. Healthy: 0.08 at most
RISEN_LOSS = 2.0  # over the lowest level before, with kl above ln K. Healthy: 1.3 with it


@dataclass(frozen=True)
class Judge:
    """`verdict(lines)` of a run with these settings, and `advice(verdict)`. Neither remembers anything.

    Args:
        args: Settings of the run.
        config: The networks' config.
        global_batch_size: Images per step, of all processes.
        num_images: Images per epoch, if known.
        num_steps: Steps of the whole run.
    """

    args: TrainingArguments
    config: DINOConfig
    global_batch_size: int
    num_images: int | None
    num_steps: int

    def verdict(self, lines: list[dict]) -> str:
        """One of the five above, after the last of these lines of training metrics, oldest first.

        A window is at least five lines, and as many steps as the teacher takes to follow the student,
        1 / (1 - momentum_teacher); twice as many to be `STUCK` or `LEARNING`, as runs may start from a plateau.
        Lines count from when the learning rate has warmed up, prototypes and backbone move, and the teacher's
        temperature does not fall any more.
        """
        args = self.args
        first_epoch = max(args.warmup_epochs, args.freeze_last_layer_epochs)
        if args.warmup_teacher_temp > args.teacher_temp:
            first_epoch = max(first_epoch, args.warmup_teacher_temp_epochs)
        window_steps = 1 / max(1 - args.momentum_teacher, 1e-4)
        first_step = args.freeze_backbone_steps or 0
        lines = [line for line in lines if line["epoch"] > first_epoch and line["step"] > first_step]
        window = _last(lines, MIN_LINES, window_steps)
        if not window or self.global_batch_size < MIN_IMAGES:
            return TOO_EARLY
        now = _medians(window)
        ln_k = math.log(self.config.out_dim)
        tells_nothing = now["target_information"] < NO_INFORMATION
        if tells_nothing and now["student_teacher_distance"] > RUNAWAY_DISTANCE:
            return DIVERGING
        if now["kl"] > ln_k:  # worse than a student that says nothing, which alone befalls healthy runs as well
            earlier = [line["loss"] for line in lines[: -len(window)]]
            levels = [median(earlier[i : i + MIN_LINES]) for i in range(0, len(earlier), MIN_LINES)]
            if levels and now["loss"] > RISEN_LOSS * min(levels):
                return DIVERGING
        # on its way there, too
        is_uniform = max(now["teacher_entropy"], lines[-1]["teacher_entropy"]) > UNIFORM_ENTROPY * ln_k
        few_answers = now["target_information"] < math.log(2) and now["teacher_entropy"] < ONE_HOT_ENTROPY * ln_k
        if few_answers or (tells_nothing and not is_uniform):
            return COLLAPSING
        long_window = _last(lines, 2 * MIN_LINES, 2 * window_steps)
        if not long_window:
            return TOO_EARLY
        return STUCK if _medians(long_window)["target_information"] < NO_INFORMATION else LEARNING

    def advice(self, verdict: str) -> str:
        """What has helped others, of what these settings leave to be tried, by the names and values that they have.

        Sources: the issues of the original (246, 43, 61, 122, 104), the paper's table of teacher temperatures and
        centre momenta, and what trained on digits here.
        """
        args, config = self.args, self.config
        tried = []
        # how fast the teacher runs from its own mean, and how fast the centre follows
        pull, follow = (
            (1 - args.momentum_teacher) * (args.student_temp / args.teacher_temp - 1),
            1 - args.center_momentum,
        )
        if args.centering != "ema":
            pass  # no target sees the centre
        elif verdict != DIVERGING and pull > follow / 2:
            to = f"{1 - 2 * pull:.2g} or less" if 2 * pull < 1 else "0"
            tried.append(f"lower center_momentum ({args.center_momentum:g}) to {to}")
        elif args.center_momentum > 0.99:
            tried.append(f"lower center_momentum ({args.center_momentum:g}) to 0.9")
        if verdict == DIVERGING or (args.optimizer == "adamw" and args.base_learning_rate > 5e-4):
            tried.append(f"lower base_learning_rate ({args.base_learning_rate:g})")
        if verdict == DIVERGING and args.warmup_epochs < 1:
            tried.append(f"raise warmup_epochs ({args.warmup_epochs:g})")
        if verdict == DIVERGING and not 0 < args.clip_grad <= 3:
            tried.append(f"set clip_grad ({args.clip_grad:g}) to 3")
        temp = max(args.teacher_temp, args.warmup_teacher_temp)
        if verdict == STUCK and temp > 0.02:
            names = f"teacher_temp ({args.teacher_temp:g}) and warmup_teacher_temp ({args.warmup_teacher_temp:g})"
            tried.append(f"lower {names} to {0.04 if temp > 0.04 else 0.02}")
        if verdict == COLLAPSING and args.teacher_temp < 0.02:
            tried.append(f"raise teacher_temp ({args.teacher_temp:g}) to 0.02 or 0.04")
        if verdict == STUCK and not config.use_bn_in_head:
            tried.append("set use_bn_in_head (false) to true")
        if not config.norm_last_layer:
            tried.append("set norm_last_layer (false) to true")
        fewer = 8192 if self.num_images is None else max(1024, 2 ** round(math.log2(self.num_images / 20)))
        if verdict != DIVERGING and config.out_dim > 2 * fewer:
            tried.append(f"lower out_dim ({config.out_dim}) to {fewer}")
        if args.freeze_last_layer_epochs < 3:
            tried.append(f"raise freeze_last_layer_epochs ({args.freeze_last_layer_epochs}) to 3")
        if verdict != STUCK and self.global_batch_size <= 256 and args.momentum_teacher < 0.9995:
            # a teacher that follows within 2000 steps is none for a short run
            to = 1 - max(0.0005, 10 / self.num_steps)
            if to > args.momentum_teacher:
                tried.append(f"raise momentum_teacher ({args.momentum_teacher:g}) to {to:.4g}")
        if verdict == STUCK and self.global_batch_size < 256:
            tried.append(f"take larger batches ({self.global_batch_size} images now)")
        if not tried:
            return "none of the usual remedies is left: look at crops.png, and measure k-NN by eval_steps"
        return "what has helped others: " + "; ".join(tried[:5])


def _last(lines: list[dict], num_lines: int, num_steps: float) -> list[dict]:
    """The shortest end of `lines` with so many lines and steps from the first to the last; empty if there is none."""
    for start in range(len(lines) - num_lines, -1, -1):
        if lines[-1]["step"] - lines[start]["step"] >= num_steps:
            return lines[start:]
    return []


def _medians(lines: list[dict]) -> dict[str, float]:
    names = ("loss", "kl", "teacher_entropy", "target_information", "student_teacher_distance")
    return {name: median(line[name] for line in lines) for name in names}
