"""Fig. 6: images that the reverse SDE gets wrong and COUP does not; and the opposite kind."""

import numpy as np

from coupfast.evaluation.report import Section, Table
from coupfast.experiments import images
from coupfast.experiments.defenses import EOT_ASSUMED, LOST
from coupfast.experiments.experiment import Experiment, Results
from coupfast.experiments.paper import gallery
from coupfast.wording import counted

_SHOWN = 6
_PAIR = ("reverse-sde", "coup")


def _kinds(results: Results) -> tuple[np.ndarray, np.ndarray]:
    return images.opposite(*(gallery.right(results, method) for method in _PAIR))


def _sections(results: Results) -> list[Section]:
    helped, hurt = _kinds(results)
    count = len(results.measured["labels"])
    row = (str(count), str(len(helped)), str(len(hurt)))
    sections: list[Section] = [
        Table("How many there are", ("images", "only COUP is right", "only the reverse SDE is right"), [row])
    ]
    note = "The first ones in the order of the data, at one draw of the noise; attacked through the reverse SDE."
    for title, chosen in (("COUP is right, the reverse SDE is not", helped), ("The reverse SDE is right, COUP is not", hurt)):
        if len(chosen):
            sections.append(gallery.picture(results, title, chosen[:_SHOWN], _PAIR, note))
    if not len(helped) + len(hurt):
        title = "Neither kind was found: the first images"
        sections.append(gallery.picture(results, title, np.arange(min(_SHOWN, count)), _PAIR, note))
    return sections


def _concludes(results: Results) -> list[str]:
    helped, hurt = _kinds(results)
    count = len(results.measured["labels"])
    return [
        f"Of {counted(count, 'image')} attacked through the reverse SDE, at one draw of the noise {len(helped)} "
        f"{'is' if len(helped) == 1 else 'are'} right with COUP only and {len(hurt)} with the reverse SDE only.",
        "COUP was not attacked here: the paper's figure, and this one, show a transferred attack on it (fig2a has both).",
    ]


EXPERIMENT = Experiment(
    name="fig6",
    place="Fig. 6",
    title="images that guidance sets right",
    asks="What do images look like that the reverse SDE gets wrong and COUP does not, and are there opposite ones?",
    setting="Bad cases of COUP without guidance that are right with it, in the setting of Fig. 2b; a grid of images",
    cases=[gallery.ATTACKED],
    measure=gallery.measure,
    sections=_sections,
    concludes=_concludes,
    assumptions=(LOST, EOT_ASSUMED),
)
