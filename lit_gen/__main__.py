"""`python -m lit_gen VERB`."""

from typing import NoReturn

from lit_gen import interrupts

interrupts.install()  # before anything slow: a signal during the imports must be remembered, not kill the process


def main() -> NoReturn:
    from lit_gen.cli import main as run

    interrupts.end(run())


if __name__ == "__main__":
    main()
