"""Say clearly when this Python cannot run the project. Any Python 3 can run this file."""
import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        f"This project needs Python 3.11, 3.12 or 3.13, and {sys.executable} is "
        f"Python {sys.version_info[0]}.{sys.version_info[1]}.\n"
        "Name another one, for example:  make book PYTHON=python3.12"
    )
