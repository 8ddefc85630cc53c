"""The numbers of a report: title, formula and meaning of each, in the order they are shown.

Notation: T tasks; ``a_{k,i}`` is the accuracy on task i with the model after task k, all classes known by
then competing; ``b_{k,i}`` the same with the choice limited to the classes of task i.
"""

from typing import NamedTuple

from duallora_edge.learner.report.intervals import Interval, is_too_wide
from duallora_edge.learner.report.metrics import BINS

TOO_FEW = "too few to tell"


def span(interval: Interval | None) -> str:
    """An interval of fractions as text for people: "86.0 to 89.9"; "" without one."""
    return "" if interval is None else " to ".join(f"{round(100 * end, 1) + 0.0:.1f}" for end in interval)


class Definition(NamedTuple):
    """What one number of `Metrics.summary` means. In formulas ``_{...}`` marks an index.

    ``several_tasks``: after one task it is missing, trivial or the last accuracy once more.
    """

    title: str
    formula: str
    meaning: str
    higher_is_better: bool
    points: bool = False
    several_tasks: bool = False

    def format(self, value: float | None) -> str:
        """A fraction as text for people: ``0.881`` is "88.1 %", or "88.1 points" for a difference."""
        if value is None:
            return "–"
        return f"{round(100 * value, 1) + 0.0:.1f} {'points' if self.points else '%'}"

    def headline(self, value: float | None, interval: Interval | None) -> str:
        """`format`, or "too few to tell" where the interval is so wide that the number would mislead."""
        return TOO_FEW if is_too_wide(interval) else self.format(value)


DEFINITIONS = {
    "last_accuracy": Definition(
        "Last accuracy",
        "A_{T} = correct answers / test images, over all tasks, after task T",
        "The headline: every image of every task counts once, all classes compete, the task is not given.",
        True,
    ),
    "last_accuracy_task_mean": Definition(
        "Last accuracy, mean over tasks",
        "mean over i ≤ T of a_{T,i}",
        "Every task counts once, however many test images it has.",
        True,
        several_tasks=True,
    ),
    "last_accuracy_task_given": Definition(
        "Last accuracy, task given",
        "correct answers / test images, the choice limited to the classes of the image's task, after task T",
        "What would be reached if confusion between tasks were impossible. Only the choice of the class is"
        " limited; the network is not told the task.",
        True,
        several_tasks=True,
    ),
    "average_incremental_accuracy": Definition(
        "Average incremental accuracy",
        "mean over k ≤ T of A_{k}, where A_{k} is the accuracy after task k over all images of tasks 1..k",
        "Accuracy over the whole life of the model, not only at its end (Rebuffi et al. 2017, iCaRL).",
        True,
        several_tasks=True,
    ),
    "forgetting_from_best": Definition(
        "Forgetting from the best",
        "mean over i < T of ( max over i ≤ k < T of a_{k,i} − a_{T,i} )",
        "How far each earlier task has fallen from the best it ever was (Chaudhry et al. 2018, Riemannian"
        " Walk). Negative when earlier tasks improved.",
        False,
        points=True,
        several_tasks=True,
    ),
    "forgetting_since_learned": Definition(
        "Forgetting since learned",
        "mean over i < T of ( a_{i,i} − a_{T,i} )",
        "How far each earlier task has fallen from where it was when it had just been learned. This is the"
        " backward transfer with its sign turned.",
        False,
        points=True,
        several_tasks=True,
    ),
    "forgetting_task_given": Definition(
        "Forgetting, task given",
        "mean over i < T of ( b_{i,i} − b_{T,i} )",
        "The same drop with the choice limited to the task's own classes: new classes cannot take images"
        " away, so what is left is the drift of the network and its classifier.",
        False,
        points=True,
        several_tasks=True,
    ),
    "backward_transfer": Definition(
        "Backward transfer",
        "mean over i < T of ( a_{T,i} − a_{i,i} )",
        "What learning later tasks did to earlier ones (Lopez-Paz and Ranzato 2017, GEM). Negative values"
        " are forgetting.",
        True,
        points=True,
        several_tasks=True,
    ),
    "task_accuracy": Definition(
        "Task identity",
        "images whose most probable task is their own / test images, after task T",
        "How often the model finds by itself which task an image comes from. Ambiguous where a class"
        " appears in several tasks: the class can be right while the task is not.",
        True,
        several_tasks=True,
    ),
    "calibration_error": Definition(
        "Calibration error (ECE)",
        f"sum over {BINS} bins m of ( n_{{m}} / n ) · | accuracy_{{m}} − confidence_{{m}} |, after task T",
        "By how much the stated confidence differs from the share of right answers, in bins of equal width"
        " (Guo et al. 2017).",
        False,
    ),
    "false_novelty": Definition(
        "Known images called novel",
        "images called novel / test images, after task T",
        "False alarms: the threshold promises 5 % on images like those of the training. Images from elsewhere"
        " have more.",
        False,
    ),
    "novelty_detected": Definition(
        "Unknown images called novel",
        "images called novel by the model before their task was learned / test images of tasks with new classes",
        "How many images of classes that the model does not know yet it says so of.",
        True,
        several_tasks=True,
    ),
}
