export default (req, res => 1;
