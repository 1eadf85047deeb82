"""`python -m influent` is the command `influent`."""

from influent.cli import main

if __name__ == "__main__":
    main()
