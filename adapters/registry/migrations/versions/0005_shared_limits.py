"""What keys use of their limits, on all servers together."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "limit_buckets",
        sa.Column("key", sa.String(128), primary_key=True),
        sa.Column("requests", sa.Double, nullable=False),
        sa.Column("tokens", sa.Double, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "limit_holders",
        sa.Column("key", sa.String(128), primary_key=True),
        sa.Column("server", sa.String(32), primary_key=True),
        sa.Column("running", sa.Integer, nullable=False),
        sa.Column("until", sa.BigInteger, nullable=False),
    )
