"""Tables of probes in the report: what `ecg-jax table` wrote, marked as there."""

import pytest

from ecg_jax.errors import DataError
from ecg_jax.scaling import probed

HEAD = "metric,encoder,column,value,ci_low,ci_high,best,tied\n"


def test_a_table_is_laid_out_with_its_marks_and_intervals(tmp_path):
    path = tmp_path / "table-auroc.csv"
    path.write_text(
        HEAD + "auroc,<R4>,ptbxl:form,0.91,0.88,0.94,True,False\nauroc,T4,ptbxl:form,0.9,0.87,0.93,False,True\n"
    )
    other = tmp_path / "table-bce.csv"
    other.write_text(HEAD + "bce,T4,mean of five,0.2,,,True,False\n")
    html = "".join(probed.render(probed.read([path, other])))
    assert html.count("<table") == 2 and "<R4>" not in html and "&lt;R4&gt;" in html
    assert "<b>0.910</b> [0.880, 0.940]" in html and "0.900 = [0.870, 0.930]" in html and "<b>0.200</b><" in html


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", HEAD + "auroc,x,y,high,,,True,False\n", HEAD + "auroc,x,y,inf,,,,\n", "\0"]
)
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=r"t\.csv"):
        probed.read([path])
    with pytest.raises(DataError, match=r"none\.csv"):
        probed.read([tmp_path / "none.csv"])
