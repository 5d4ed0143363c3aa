"""`python -m launcher.evaluation.making` writes the shipped tasks into launcher/evaluation/tasks."""

from launcher.evaluation.finding import SHIPPED
from launcher.evaluation.making import contents, made_tasks


def main() -> None:
    SHIPPED.mkdir(exist_ok=True)
    for name, content in contents(made_tasks()).items():
        (SHIPPED / name).write_bytes(content)


if __name__ == "__main__":
    main()
