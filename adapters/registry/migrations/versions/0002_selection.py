"""With each version, which of the files that came were its own. Versions from before have none."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column."""
    op.add_column("versions", sa.Column("selection", sa.JSON))
