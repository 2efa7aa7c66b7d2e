BEGIN TRANSACTION;
CREATE TABLE admissions (
	content VARCHAR(64) NOT NULL, 
	base VARCHAR(64) NOT NULL, 
	refused TEXT, 
	receipt JSON NOT NULL, 
	PRIMARY KEY (content, base), 
	FOREIGN KEY(content) REFERENCES contents (id)
);
INSERT INTO "admissions" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','0000000000000000000000000000000000000000000000000000000000000000',NULL,'{"checked": 1795373828}');
INSERT INTO "admissions" VALUES('bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','0000000000000000000000000000000000000000000000000000000000000000',NULL,'{"checked": 1795373829}');
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE contents (
	id VARCHAR(64) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	stored_bytes BIGINT NOT NULL, 
	rank INTEGER NOT NULL, 
	targets INTEGER NOT NULL, 
	touched BIGINT NOT NULL, 
	deleting BOOLEAN NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "contents" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',768,900,1,1,1795373828000000,0);
INSERT INTO "contents" VALUES('bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',768,900,1,1,1795373829000000,0);
CREATE TABLE names (
	name VARCHAR(128) NOT NULL, 
	folded VARCHAR(128) NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	active INTEGER, 
	last INTEGER NOT NULL, 
	pinned BOOLEAN NOT NULL, 
	created BIGINT NOT NULL, 
	revision BIGINT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "names" VALUES('legal','legal','adapter',1,2,1,1795373828,6);
INSERT INTO "names" VALUES('prod','prod','alias',NULL,0,0,1795373830,7);
INSERT INTO "names" VALUES('old','old','gone',NULL,4,0,1795373820,2);
CREATE TABLE registry (
	id INTEGER NOT NULL, 
	revision BIGINT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "registry" VALUES(1,7);
CREATE TABLE targets (
	alias VARCHAR(128) NOT NULL, 
	position INTEGER NOT NULL, 
	adapter VARCHAR(128) NOT NULL, 
	number INTEGER, 
	weight FLOAT NOT NULL, 
	PRIMARY KEY (alias, position), 
	FOREIGN KEY(alias) REFERENCES names (name), 
	FOREIGN KEY(adapter) REFERENCES names (name)
);
INSERT INTO "targets" VALUES('prod',0,'legal',1,90.0);
INSERT INTO "targets" VALUES('prod',1,'legal',NULL,10.0);
CREATE TABLE versions (
	name VARCHAR(128) NOT NULL, 
	number INTEGER NOT NULL, 
	content VARCHAR(64) NOT NULL, 
	created BIGINT NOT NULL, 
	source TEXT NOT NULL, 
	PRIMARY KEY (name, number), 
	CONSTRAINT one_version_per_content UNIQUE (name, content), 
	FOREIGN KEY(name) REFERENCES names (name), 
	FOREIGN KEY(content) REFERENCES contents (id)
);
INSERT INTO "versions" VALUES('legal',1,'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',1795373828,'folder legal');
INSERT INTO "versions" VALUES('legal',2,'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',1795373829,'folder legal');
CREATE TABLE watched (
	folder VARCHAR(1024) NOT NULL, 
	signature TEXT NOT NULL, 
	refused TEXT, 
	since BIGINT NOT NULL, 
	PRIMARY KEY (folder)
);
CREATE INDEX ix_names_revision ON names (revision);
CREATE INDEX ix_names_folded ON names (folded);
CREATE INDEX ix_versions_content ON versions (content);
CREATE INDEX ix_targets_adapter ON targets (adapter);
COMMIT;
