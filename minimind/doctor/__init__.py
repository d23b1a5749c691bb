"""What would go wrong in a run, found before it: `minimind doctor RECIPE`, and the quick checks at
every start.

registry.py     what a check examines and returns
cases.py        a recipe -> what its checks examine
examination.py  all checks in their order, and their findings
report.py       the findings in the terminal

deepspeed.py, precision.py, model.py, rates.py, recipe.py, data.py, budget.py, speed.py: the checks
"""

from minimind.doctor.examination import doctor, examine, examine_run
from minimind.doctor.report import print_report

__all__ = ["doctor", "examine", "examine_run", "print_report"]
