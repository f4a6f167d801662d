"""``python train.py method=adamerging_layerwise``: learn coefficients, merge, report and export."""

from adamerge.cli import main

if __name__ == "__main__":
    main()
