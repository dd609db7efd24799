"""Say clearly when this Python cannot run the project. Runs on any Python 3, so the syntax is plain."""
import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        "This project needs Python 3.11, 3.12 or 3.13; %s is Python %d.%d.\n"
        "Name another one, for example:  make book PYTHON=python3.12" % ((sys.executable,) + sys.version_info[:2])
    )
