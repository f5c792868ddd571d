"""`python -m lit_gen VERB`."""

from lit_gen import interrupts

interrupts.install()  # before anything slow: a signal during the imports must be remembered, not kill the process


def main() -> int:
    from lit_gen.cli import main as run

    status = run()
    interrupts.let_go()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
