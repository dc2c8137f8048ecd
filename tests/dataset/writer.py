"""Writes a dataset slowly enough to be killed anywhere: `python writer.py FOLDER PAUSE_S`."""

import sys
import time
from pathlib import Path

from services.dataset import groups
from services.dataset.store import DatasetWriter
from tests.dataset import helpers

GROUPS = ("neuron.0", "neuron.1", "head.0", "latent.d")
PARTS, SIZE = 4, 6


def main(folder: Path, pause_s: float) -> None:
    with DatasetWriter(folder, helpers.header(), {"seed": 3}) as writer:
        print("writing", flush=True)
        for name in GROUPS:
            group = groups.parse(name)
            for part in range(PARTS):
                indices = range(part * SIZE, (part + 1) * SIZE)
                if writer.has(group, part):
                    continue
                made = helpers.random_records(
                    part, [group.component(index) for index in indices], tokens=40
                )

                def slowly(items: list[helpers.Record]) -> helpers.Records:
                    for item in items:
                        time.sleep(pause_s)
                        yield item

                writer.write(group, part, slowly(made))
        writer.finish(helpers.VOCABULARY)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
