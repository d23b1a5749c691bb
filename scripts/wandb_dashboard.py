"""Put the dashboard of configs/dashboard.json into a wandb project, as a saved view for all runs.

pip install wandb-workspaces
python scripts/wandb_dashboard.py ENTITY                 # needs a wandb login
python scripts/wandb_dashboard.py ENTITY --print         # what would be saved, without a network
"""

import argparse
import json
from pathlib import Path

DESCRIPTION = Path(__file__).parents[1] / "configs" / "dashboard.json"


def build(description: dict, entity: str, project: str):
    """The description's sections as a workspace of wandb's own package; each panel draws over the
    training step."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2 import LinePlot

    sections = [
        workspaces.Section(
            name=section["name"],
            is_open=True,
            panels=[
                LinePlot(title=panel["title"], x="train/global_step", y=panel["metrics"])
                for panel in section["panels"]
            ],
        )
        for section in description["sections"]
    ]
    return workspaces.Workspace(
        entity=entity, project=project, name=description["name"], sections=sections
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entity", help="user or team on wandb")
    parser.add_argument("--project", default="minimind", help="project of the runs")
    parser.add_argument(
        "--print", action="store_true", help="print the view as JSON and save nothing"
    )
    args = parser.parse_args()
    workspace = build(
        json.loads(DESCRIPTION.read_text(encoding="utf-8")), args.entity, args.project
    )
    if args.print:
        print(workspace._to_model().spec.model_dump_json(indent=2, by_alias=True))
    else:
        print(workspace.save().url)


if __name__ == "__main__":
    main()
