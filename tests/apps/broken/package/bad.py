from package.inner import missing_name
