-- Run once, by the image of Postgres, when the database is made: the role of cdc-sync. The table is made later, by the
-- writer, which also makes the publication.
\set password `cat /run/secrets/password`
CREATE ROLE cdc_sync LOGIN REPLICATION PASSWORD :'password';
GRANT CONNECT ON DATABASE app TO cdc_sync;
GRANT USAGE ON SCHEMA public TO cdc_sync;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO cdc_sync;
