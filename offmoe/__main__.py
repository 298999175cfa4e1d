"""`python -m offmoe`: the same as the `offmoe` command."""

import sys

if __name__ == "__main__":
    try:
        from offmoe.cli import main

        status = main()
    except KeyboardInterrupt:  # while importing: main answers its own
        status = 130
    sys.exit(status)
