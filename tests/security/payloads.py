"""What is sent: SQL meant to be run, names meant to lead elsewhere, text meant to break headers, log lines and terminals. Data only."""

from __future__ import annotations

_TABLES = ("rows", "texts", "facts", "fts", "sqlite_master", "temp.lists", "documents", "METADATA")

_CLASSIC = (
    "' OR '1'='1", "' OR 1=1 --", "' OR 1=1#", "' OR 1=1/*", "') OR ('1'='1", "')) OR (('1'='1", '" OR ""="', '" OR 1=1 --', "1 OR 1=1",
    "1' OR '1'='1' --", "' OR 'x'='x", "' OR TRUE --", "' OR NOT FALSE --", "x' OR year > 0 --", "1 AND 1=1", "1=1 OR 1=1", "1=1 AND 1=0",
    "1=1=1", "0x31=0x31", "-1=-1", "1=1.0", "1 = 1 = 1", "year = year", "year = 2000 OR 1", "title = title", "title = 'a'", 'title = "a"',
    "title = ? OR 1=1", "title = ? OR title IS NOT NULL OR 1", "NOT 1=0", "(1=1)", "title IS 1", "title NOTNULL", "title ISNULL",
    "? = ?", "? IS NULL", "title = ?1", "title = :a", "title = @a", "title = $a", "title == ?", "title || ? = ?", "+year = ?", "-year = ?",
    "~year = ?", "year = ? + 1", "year = (?)", "year IN ()", "year IN (SELECT 1)", "year IN rows", "(year, title) = (?, ?)",
    "rowid = ?", "oid = ?", "_rowid_ = ?", '"#ordinal" = ?', '"#id" >= ?', "rows.year = ?", "main.rows.year = ?", "temp.patched.year = ?",
    "fts = ?", "fts MATCH ?", "rank = ?", "_content_id_ = ?", "_fts_content_ : a", "title COLLATE NOCASE = ?", "title GLOB ?",
    "title LIKE ? ESCAPE ?", "year BETWEEN ? AND ? AND ? BETWEEN ? AND ?", "title -> ? = ?", "title ->> ? = ?", "year IS DISTINCT FROM ?",
)  # fmt: skip
_STACKED = (
    "1=1; DROP TABLE rows", "'; DROP TABLE rows; --", "\"; DELETE FROM rows; --", "1; DELETE FROM main.rows", "1=1; UPDATE rows SET year = 0",
    "'; INSERT INTO rows VALUES(99, 99, 'x'); --", "'; CREATE TABLE owned(a); --", "'; ALTER TABLE rows ADD COLUMN owned; --", "'; VACUUM; --",
    "'; VACUUM INTO '/tmp/tartan-owned.db'; --", "'; REINDEX; --", "'; ANALYZE; --", "'; BEGIN; --", "'; COMMIT; --", "'; ROLLBACK; --",
    "'; SAVEPOINT a; --", "'; DETACH DATABASE main; --", "'; REPLACE INTO rows VALUES(1, 1, 1); --", "'; EXPLAIN SELECT 1; --",
    "'; CREATE TRIGGER t AFTER INSERT ON rows BEGIN DELETE FROM rows; END; --", "'; CREATE VIEW v AS SELECT * FROM rows; --",
    "'; CREATE TEMP TABLE temp.patched(a); --", "'; INSERT INTO fts(fts) VALUES('delete-all'); --", "'; INSERT INTO fts(fts) VALUES('rebuild'); --",
    "year = ?; SELECT 1", "year = ?;;", ";",
)  # fmt: skip
_COMMENTS = (
    "year = ? -- ", "year = ? --", "--", "/*", "*/", "year /**/ = ?", "year/**/=/**/?", "ye/**/ar = ?", "year = ? /*! OR 1=1 */", "year = ? #",
    "/*!50000 SELECT*/ 1", "year = ? -\u2010 x", "year = ? \u2013\u2013 x", "1=1 -- -", "1=1\n--\n", "1=1\r\n-- x", "1=1 //", "1=1 {comment",
)  # fmt: skip
_UNION = (
    "' UNION SELECT 1 --", "' UNION ALL SELECT sql FROM sqlite_master --", "1 UNION SELECT name FROM sqlite_schema", "') UNION SELECT NULL, NULL --",
    "year = ? UNION SELECT 1", "year = ? INTERSECT SELECT 1", "year = ? EXCEPT SELECT 1", "year IN (SELECT year FROM rows)", "EXISTS (SELECT 1)",
    "EXISTS (VALUES (1))", "(SELECT 1)", "(VALUES (1)) = ?", "title = (SELECT group_concat(sql) FROM sqlite_master)", "UNiOn SeLeCt 1",
    "uniunionon selselectect 1", "1 GROUP BY 1 HAVING 1=1", "1 ORDER BY 9", "1 LIMIT 1", "1 OFFSET 1", "1 RETURNING *", "CASE WHEN 1 THEN 1 END",
    "CASE year WHEN ? THEN 1 ELSE 0 END = ?", "CAST(year AS TEXT) = ?", "RAISE(ABORT, 'x')", "json_each.value = ?", "pragma_table_info('rows')",
    *(f"1 UNION SELECT * FROM {table}" for table in _TABLES), *(f"EXISTS (TABLE {table})" for table in _TABLES),
)  # fmt: skip
_BLIND = (
    "1 AND (SELECT count(*) FROM rows) > 0", "substr(title, 1, 1) = 'a'", "length(title) > ?", "unicode(title) > ?", "instr(title, ?) > 0",
    "hex(title) = ?", "' AND substr((SELECT sql FROM sqlite_master LIMIT 1), 1, 1) = 'C' --", "' AND 1=(CASE WHEN (1=1) THEN 1 ELSE 1/0 END) --",
    "1/0 = 1", "abs(-9223372036854775808) = 1", "iif(1, 1, 0) = 1", "nullif(1, 1) IS NULL", "coalesce(title, ?) = ?", "typeof(year) = 'integer'",
    "likelihood(year = ?, 0.5)", "total_changes() = 0", "changes() > 0", "last_insert_rowid() = ?", "sqlite_version() > ?", "sqlite_source_id() > ?",
    "sqlite_compileoption_used('ENABLE_FTS5') = 1", "' AND randomblob(100000000) --", "1 AND randomblob(1000000000)", "like('a%', randomblob(99999999))",
    "zeroblob(1000000000) = ?", "hex(zeroblob(500000000)) = ?", "printf('%.1000000000d', 1) = ?", "format('%*d', 999999999, 1) = ?",
    "replace(hex(zeroblob(100000)), '00', hex(zeroblob(100000))) = ?", "' || sleep(5) || '", "pg_sleep(5) = 1", "WAITFOR DELAY '0:0:5'",
    "benchmark(1000000000, md5(1)) = 1", "regexp('(a+)+$', title)", "title REGEXP '(a+)+$'", "random() = ?",
)  # fmt: skip
_SQLITE = (
    "ATTACH DATABASE '/tmp/tartan-owned.db' AS owned", "' ; ATTACH '/etc/passwd' AS p --", "ATTACH ? AS x", "DETACH x", "PRAGMA table_info(rows)",
    "PRAGMA writable_schema = 1", "PRAGMA user_version = 9", "PRAGMA database_list", "PRAGMA journal_mode = WAL", "PRAGMA temp_store_directory = '/tmp'",
    "PRAGMA query_only = 0", "PRAGMA trusted_schema = 1", "PRAGMA module_list", "pragma_database_list.file = ?", "load_extension('/tmp/owned.so')",
    "load_extension('/tmp/owned.so', 'init') = 1", "writefile('/tmp/tartan-owned', 'x') > 0", "readfile('/etc/passwd') = ?", "edit(title, 'sh') = ?",
    "fts5(1) = ?", "fts3_tokenizer('simple', x'00') = ?", "bm25(fts) < 0", "highlight(fts, 0, '<', '>') = ?", "snippet(fts, 0, '', '', '', 1) = ?",
    "fts5_source_id() = ?", "rtreecheck('rows') = ?", "dbstat.name = ?", "sqlite_dbpage.pgno = ?", "json_extract(title, '$') = ?",
    "json_each(title) = ?", "json_group_array(title) = ?", "group_concat(title) = ?", "generate_series(1, 1000000000) = ?", "fsdir('/') = ?",
    "zipfile('/tmp/x') = ?", "sqlar_compress(title) = ?", "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n",
    "year = (WITH RECURSIVE n(x) AS (VALUES(1) UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n)", "x'41' = title", "X'00' = ?",
    "CURRENT_TIMESTAMP = ?", "current_date > ?", "INDEXED BY lists_by_number", "NOT INDEXED", "title MATCH ?", "title MATCH 'a'", "year IS NOT DISTINCT FROM ?",
    "INSERT OR REPLACE INTO rows VALUES(1)", "SELECT * FROM rows", "DELETE FROM rows", "DROP TABLE rows", "VALUES(1)", "EXPLAIN QUERY PLAN SELECT 1",
    "[year] = ?", "`year` = ?", "'year' = ?", '"year"" OR 1=1 OR ""year" = ?', '"year" OR "year" = ?"',
)  # fmt: skip
_UNICODE = (
    "\u02bc OR 1=1 --", "\u2019 OR \u20191\u2019=\u20191", "\uff07 OR 1=1", "\uff02 OR 1=1", "\u201c OR 1=1", "\u00b4 OR 1=1", "year \uff1d ?", "year = \uff1f",
    "\uff59\uff45\uff41\uff52 = ?", "ye\u0430r = ?", "year\u00a0= ?", "year\u2003= ?", "year\u200b = ?", "year\u2028= ?", "\ufeffyear = ?", "year = ?\u037e DROP TABLE rows",
    "SEL\u0130CT 1", "\u017fELECT 1", "U\u0147ION", "%27 OR 1=1 --", "%2527 OR 1=1", "&#39; OR 1=1", "\\' OR 1=1 --", "\\u0027 OR 1=1", "\x00' OR 1=1 --",
    "year = ?\x00 OR 1=1", "year = ? \x1a", "\x1b[31m", "\xbf' OR 1=1 --", "\u202e?= raey", "ye\u0301ar = ?", "{{7*7}}", "${jndi:ldap://x/a}", "%s%s%n", "{0.__class__}",
    "$(id)", "`id`", "| id", "__import__('os').system('id')", "../../etc/passwd", "<script>alert(1)</script>",
)  # fmt: skip
SQL: tuple[str, ...] = tuple(dict.fromkeys((*_CLASSIC, *_STACKED, *_COMMENTS, *_UNION, *_BLIND, *_SQLITE, *_UNICODE)))
"""Conditions that are none, keyword queries, values and column names, each once."""

RAW_SQL: tuple[str, ...] = (
    "DELETE FROM main.rows", "UPDATE main.rows SET year = 0", "INSERT INTO main.rows VALUES(9, 9, 9, 9)", "DROP TABLE main.rows", "CREATE TABLE owned(a)",
    "CREATE TEMP TABLE owned(a)", "CREATE VIEW owned AS SELECT 1", "CREATE TEMP TRIGGER t AFTER INSERT ON temp.lists BEGIN SELECT 1; END",
    "CREATE VIRTUAL TABLE temp.owned USING fts5(a)", "ALTER TABLE main.rows RENAME TO owned", "INSERT INTO temp.lists VALUES(1, 1)", "DELETE FROM temp.lists",
    "INSERT INTO main.fts(fts) VALUES('delete-all')", "INSERT INTO main.fts(fts) VALUES('rebuild')", "INSERT INTO main.fts(fts, rank) VALUES('automerge', 0)",
    "ATTACH DATABASE '{folder}/owned.db' AS owned", "ATTACH ':memory:' AS owned", "ATTACH 'file:{folder}/owned.db?mode=rwc' AS owned", "DETACH main",
    "VACUUM", "VACUUM INTO '{folder}/owned.db'", "REINDEX", "ANALYZE", "BEGIN", "SAVEPOINT a", "PRAGMA writable_schema = 1", "PRAGMA user_version", "PRAGMA query_only = 0",
    "PRAGMA temp_store_directory = '{folder}'", "PRAGMA database_list", "PRAGMA journal_mode = DELETE", "PRAGMA trusted_schema = 1", "PRAGMA hard_heap_limit = 1",
    "SELECT * FROM pragma_database_list", "SELECT * FROM pragma_module_list", "SELECT load_extension('{folder}/owned.so')", "SELECT writefile('{folder}/owned', 'x')",
    "SELECT readfile('/etc/passwd')", "SELECT randomblob(1000)", "SELECT zeroblob(1000000000)", "SELECT hex(zeroblob(1000000))", "SELECT printf('%.*c', 1000000000, 'x')",
    "SELECT sqlite_version()", "SELECT sqlite_source_id()", "SELECT last_insert_rowid()", "SELECT group_concat(title) FROM main.rows", "SELECT length(title) FROM main.rows",
    "SELECT json_extract('[1]', '$[0]')", "SELECT fts5(NULL)", "SELECT highlight(fts, 0, '<', '>') FROM main.fts WHERE fts MATCH 'weft'",
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n", "WITH n AS (SELECT randomblob(9)) SELECT * FROM n",
    "SELECT * FROM dbstat", "SELECT * FROM sqlite_dbpage", "SELECT * FROM generate_series(1, 1000000000)", "SELECT * FROM fsdir('/')", "SELECT * FROM sqlite_sequence",
    "REPLACE INTO main.texts VALUES(1, 'x')", "EXPLAIN DELETE FROM main.rows",
)  # fmt: skip
"""Statements for a connection that should only read our tables; {folder} is a place to look for what they may have written."""

NAMES: tuple[str, ...] = (
    "..", ".", "../outside", "../../outside", "../../../../../../etc/passwd", "/etc/passwd", "//etc/passwd", "/", "./inside", "inside/../../outside", "a/..", "a/../b",
    "..\\outside", "..\\..\\outside", "\\\\server\\share", "C:\\outside", "C:outside", "a\\b", "~", "~root", "~/outside", "$HOME", "${HOME}/outside", "%HOME%",
    "%2e%2e", "%2e%2e%2foutside", "..%2foutside", "..%252foutside", "%252e%252e%252foutside", "..%c0%afoutside", "%c0%ae%c0%ae/outside", "..%5coutside", "..;/outside",
    "inside\x00", "\x00", "inside\x00/../../outside", "inside%00", "inside\n", "inside\r\nX: y", "\ninside", "inside ", " inside", "inside\t", "in side", "inside/", "inside//",
    "\u2025/outside", "\uff0e\uff0e/outside", "\uff0e\uff0e\uff0foutside", "..\u2215outside", "..\u2044outside", "in\u200bside", "\u0456nside", "insi\u0301de", "\u202einside",
    ".tartan", ".tartan/locks", ".hidden", "_aliases", "_aliases/live", "_records", "inside/CURRENT", "inside/segments", "CURRENT/..", "-", "-rf", "--help", "*", "?", "[a-z]*",
    "file:///etc/passwd", "http://127.0.0.1/", "s3://other/inside", "/dev/zero", "/proc/self/environ", "/dev/stdin", "x" * 129, "x" * 5000, "\x1b[31m", "\x9b31m", "",
)  # fmt: skip
"""Names that no index, alias, pin, upload or build can have. "inside" is the index that is there."""

ODD_BUT_LAWFUL: tuple[str, ...] = ("CON", "NUL", "AUX.txt", "a.", "a..", "a..b", "CURRENT", "aliases", "x" * 128)
"""Names that mean something elsewhere (devices, trailing dots) and are names like any other here."""

TEXT: tuple[bytes, ...] = (
    b"a\r\nSet-Cookie: planted=1", b"a\nplanted: 1", b"a\rplanted: 1", b"a\r\n\r\n<html>planted", b"a\x00planted", b"\x1b[31mplanted\x1b[0m", b"\x1b]0;planted\x07",
    b"\x9b31mplanted", b"a\x85planted", b"a\xe2\x80\xa8planted", b"a\xe2\x80\xa9planted", b"a\x0bplanted", b"a\x0cplanted", b"a\x7fplanted", b"a\x08\x08planted",
    b'","status":200,"planted":"', b'"}\n{"event":"planted"}', b"\\u000aplanted", b"\\", b'"', b"'", b"planted" * 2000, b"\xff\xfeplanted", b"\xed\xa0\x80planted",
    b"%0d%0aplanted: 1", b"${jndi:ldap://planted/a}", b"{{planted}}", b"%n%n%s", b"a b planted", b"\xe4\xf6planted", b"-0\n", b" ",
)  # fmt: skip
"""Values of headers that would break an answer's headers, a line of the log, or the terminal that shows it."""
