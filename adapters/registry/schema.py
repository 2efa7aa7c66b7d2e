"""The registry's tables, and their migration when a server starts.

Every change to a table is a new file in ``adapters/registry/migrations/versions``. A test checks that all migrations
together create the tables below.
"""

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Date,
    Double,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

registry = Table(
    "registry",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("revision", BigInteger, nullable=False),
)
"""One row. Every change first increments its revision and so locks it: changes of all servers are serialised."""

contents = Table(
    "contents",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("stored_bytes", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("targets", Integer, nullable=False),
    Column("touched", BigInteger, nullable=False),
    Column("deleting", Boolean, nullable=False),
)
"""Content that is stored, being stored, or being deleted. ``touched``: Unix time in microseconds of its last use."""

names = Table(
    "names",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("folded", String(128), nullable=False, index=True),
    Column("kind", String(8), nullable=False),
    Column("active", Integer),
    Column("last", Integer, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False, index=True),
)
"""Adapters and aliases. A deleted name stays with the kind ``gone``, so that other servers notice the deletion and
version numbers are never reused."""

versions = Table(
    "versions",
    metadata,
    Column("name", String(128), ForeignKey("names.name"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("content", String(64), ForeignKey("contents.id"), nullable=False, index=True),
    Column("created", BigInteger, nullable=False),
    Column("source", Text, nullable=False),
    UniqueConstraint("name", "content", name="one_version_per_content"),
    Column("selection", JSON),
)
"""``selection``: which of the received files were taken and which ignored, as the receipt shows it."""

targets = Table(
    "targets",
    metadata,
    Column("alias", String(128), ForeignKey("names.name"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("adapter", String(128), ForeignKey("names.name"), nullable=False, index=True),
    Column("number", Integer),
    Column("weight", Float, nullable=False),
)
"""Targets of the aliases."""

admissions = Table(
    "admissions",
    metadata,
    Column("content", String(64), ForeignKey("contents.id"), primary_key=True),
    Column("base", String(64), primary_key=True),
    Column("refused", Text),
    Column("receipt", JSON, nullable=False),
)
"""Results of checking a content on a base, which its fingerprint identifies."""

watched = Table(
    "watched",
    metadata,
    Column("folder", String(1024), primary_key=True),
    Column("signature", Text, nullable=False),
    Column("refused", Text),
    Column("since", BigInteger, nullable=False),
)
"""Last known states of the folders in a watched folder."""

usage = Table(
    "usage",
    metadata,
    Column("key", String(128), primary_key=True),
    Column("adapter", String(2400), primary_key=True),
    Column("day", Date, primary_key=True, index=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
)
"""What each key has used, by day (UTC). ``adapter``: versions, joined by ``+`` for a mix; empty for the base alone."""

usage_months = Table(
    "usage_months",
    metadata,
    Column("key", String(128), primary_key=True),
    Column("month", Date, primary_key=True),
    Column("tokens", BigInteger, nullable=False),
)
"""Sums of ``usage``: prompt and output tokens by the month's first day, so that a budget is one row to read."""

usage_writers = Table(
    "usage_writers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("batch", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
)
"""The last batch of usage that each running server has written, so that none is written twice. ``at``: Unix time."""

limit_buckets = Table(
    "limit_buckets",
    metadata,
    Column("key", String(128), primary_key=True),
    Column("requests", Double, nullable=False),
    Column("tokens", Double, nullable=False),
    Column("at", BigInteger, nullable=False),
)
"""What is used of the limits of a minute, by key, at the Unix time ``at`` in microseconds. It gets less by itself.
Whoever changes what a key uses, here or in ``limit_holders``, locks its row here first."""

limit_holders = Table(
    "limit_holders",
    metadata,
    Column("key", String(128), primary_key=True),
    Column("server", String(32), primary_key=True),
    Column("running", Integer, nullable=False),
    Column("until", BigInteger, nullable=False),
)
"""Parallel requests of a key that each server may have. After ``until``, Unix time in microseconds, it has died."""

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False, index=True),
    Column("key", String(128), nullable=False),
    Column("key_name", Text, nullable=False),
    Column("address", String(64)),
    Column("request_id", String(128)),
    Column("action", String(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("detail", JSON, nullable=False),
)
"""Every change, and who made it. Rows are added, and deleted when they are old. ``at``: Unix time in microseconds."""


api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("digest", String(64), nullable=False, unique=True, index=True),
    Column("prefix", String(16), nullable=False),
    Column("old_digest", String(64)),
    Column("old_until", BigInteger),
    Column("scopes", JSON, nullable=False),
    Column("adapters", JSON(none_as_null=True)),
    Column("limits", JSON, nullable=False),
    Column("weight", Float, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger),
    Column("revoked", BigInteger),
    Column("revision", BigInteger, nullable=False, index=True),
)
"""Keys of clients, without their secrets. A revoked one stays, for ever or for some days, so that other servers notice.
Times are Unix times in seconds. ``server/access/key_store.py`` reads and writes them."""


class NewerSchema(Exception):
    """A newer release of manylora has migrated the tables."""


def migrate(connection: Connection) -> None:
    """Apply all missing migrations, or none if one fails. Several servers may do so at once.

    Raises :class:`NewerSchema`, and changes nothing, if the tables are newer than this program.
    """
    if connection.dialect.name == "postgresql":
        # Held until the transaction ends. The number is arbitrary, but must never change.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(6276940712850447)")
    config = Config()
    config.set_main_option("script_location", "adapters.registry:migrations")
    config.set_main_option("path_separator", "os")
    current = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise NewerSchema(current)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
