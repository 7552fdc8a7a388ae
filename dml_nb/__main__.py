"`python -m dml_nb` is the command `dml_nb`; `torchrun` can start it."

from .face.app_cli import app

if __name__ == "__main__":
    app()
