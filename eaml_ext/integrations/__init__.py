"""Models of other packages on these ops. Each module requires the package that it is named after."""
