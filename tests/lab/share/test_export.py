from exports import contents, imported
from lab.share import sources
from lab.session import ledger

def test_arrives(session, sent, tmp_path):
    there = imported(sent, tmp_path / "elsewhere")
    assert contents(there) == contents(sent)
    rec = sources.read(str(sent))
    print((sent/"SUMMARY.md").read_text())
    print(sorted(contents(sent)))
    assert ledger.dumps(ledger.rows_of(rec.state)) == (sent/"results.tsv").read_bytes()
