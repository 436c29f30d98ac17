"""Other packages' models on these ops; each module needs the package that it is named after."""
