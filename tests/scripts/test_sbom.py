"""The table of licences that is made from a bill of materials."""

from scripts.sbom import licences, name_licences


def test_licences_by_name_in_every_form_that_packages_use() -> None:
    bill = {
        "components": [
            {"name": "torch", "version": "2.13.0", "licenses": [{"license": {"id": "BSD-3-Clause"}}]},
            {"name": "Jinja2", "version": "3.1", "licenses": [{"license": {"name": "BSD License"}}]},
            {"name": "numpy", "version": "2.0", "licenses": [{"expression": "BSD-3-Clause AND MIT"}]},
            {"name": "long", "version": "1", "licenses": [{"license": {"name": "Apache License\nVersion 2.0"}}]},
            {"name": "both", "version": "1", "licenses": [{"license": {"id": "MIT"}}, {"license": {"id": "0BSD"}}]},
            {"name": "none", "version": "1"},
        ]
    }
    assert licences(bill) == [
        ("both", "1", "0BSD, MIT"),
        ("Jinja2", "3.1", "BSD License"),
        ("long", "1", "Apache License"),
        ("none", "1", ""),
        ("numpy", "2.0", "BSD-3-Clause AND MIT"),
        ("torch", "2.13.0", "BSD-3-Clause"),
    ]


def test_a_licence_in_words_of_its_own_is_named_where_there_is_no_other() -> None:
    bill = {
        "components": [
            {"name": "transformers", "version": "5"},
            {"name": "torch", "version": "2", "licenses": [{"license": {"id": "BSD-3-Clause"}}]},
            {"name": "none", "version": "1"},
        ]
    }
    name_licences(bill, {"transformers": "Apache 2.0 License\n", "torch": "BSD", "none": ""})
    assert [licence for _, _, licence in licences(bill)] == ["", "BSD-3-Clause", "Apache 2.0 License"]
