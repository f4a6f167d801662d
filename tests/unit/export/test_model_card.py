import ast
import textwrap

from adamerge.export import loading_snippet, model_card

TABLE = "| task | merged |\n| --- | --: |\n| digits | 60.0 |\n"


def card() -> str:
    return model_card(
        suite="mini",
        base="ViT-B-32 (laion2b_s34b_b79k)",
        experts={"digits": "weights/digits.safetensors", "a|b": "weights/ab.safetensors"},
        method="adamerging_layerwise",
        settings={"steps": 500, "data.adapt": "half"},
        table=TABLE,
    )


def test_the_card_says_what_was_merged_and_how():
    text = card()
    for part in (
        "# mini merged with adamerging_layerwise",
        "ViT-B-32 (laion2b_s34b_b79k)",
        "| digits | weights/digits.safetensors |",
        "| a\\|b | weights/ab.safetensors |",
        "2 fine-tuned experts",
        "- steps: `500`\n- data.adapt: `half`\n",
        TABLE,
        "## Licence",
    ):
        assert part in text


def test_the_hub_can_read_the_header():
    from yaml import safe_load

    opening, header, _ = card().split("---\n", 2)
    assert opening == ""
    data = safe_load(header)
    assert data["library_name"] == "open_clip"
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert "license" not in data  # that of the weights is not ours to state


def test_the_snippet_is_three_lines_of_python_that_name_the_folder():
    for folder in ("outputs/run 1/merged", 'C:\\new\\"merged"'):
        snippet = loading_snippet(folder)
        assert len(snippet.splitlines()) == 3
        texts = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
        assert texts == [f"local-dir:{folder}"] * 2
    assert textwrap.dedent(loading_snippet("path/to/this/folder")) in card()
