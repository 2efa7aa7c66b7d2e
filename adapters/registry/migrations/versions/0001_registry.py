"""The first form: names, versions, aliases' targets, contents, admissions, watched folders."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    registry = op.create_table(
        "registry",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(registry, [{"id": 1, "revision": 0}])
    op.create_table(
        "contents",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("stored_bytes", sa.BigInteger, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("targets", sa.Integer, nullable=False),
        sa.Column("touched", sa.BigInteger, nullable=False),
        sa.Column("deleting", sa.Boolean, nullable=False),
    )
    op.create_table(
        "names",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("folded", sa.String(128), nullable=False, index=True),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("active", sa.Integer),
        sa.Column("last", sa.Integer, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table(
        "versions",
        sa.Column("name", sa.String(128), sa.ForeignKey("names.name"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("content", sa.String(64), sa.ForeignKey("contents.id"), nullable=False, index=True),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.UniqueConstraint("name", "content", name="one_version_per_content"),
    )
    op.create_table(
        "targets",
        sa.Column("alias", sa.String(128), sa.ForeignKey("names.name"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("adapter", sa.String(128), sa.ForeignKey("names.name"), nullable=False, index=True),
        sa.Column("number", sa.Integer),
        sa.Column("weight", sa.Float, nullable=False),
    )
    op.create_table(
        "admissions",
        sa.Column("content", sa.String(64), sa.ForeignKey("contents.id"), primary_key=True),
        sa.Column("base", sa.String(64), primary_key=True),
        sa.Column("refused", sa.Text),
        sa.Column("receipt", sa.JSON, nullable=False),
    )
    op.create_table(
        "watched",
        sa.Column("folder", sa.String(1024), primary_key=True),
        sa.Column("signature", sa.Text, nullable=False),
        sa.Column("refused", sa.Text),
        sa.Column("since", sa.BigInteger, nullable=False),
    )
