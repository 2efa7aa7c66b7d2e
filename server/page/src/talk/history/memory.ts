/** A browser's storage for tests, with room for so many characters. */
export class Memory implements Storage {
  readonly items = new Map<string, string>();
  constructor(private readonly room = Infinity) {}

  get length(): number {
    return this.items.size;
  }

  key = (place: number) => [...this.items.keys()][place] ?? null;
  getItem = (name: string) => this.items.get(name) ?? null;
  removeItem = (name: string) => void this.items.delete(name);
  clear = () => this.items.clear();
  setItem = (name: string, text: string) => {
    const others = [...this.items].reduce(
      (sum, [other, its]) => (other === name ? sum : sum + its.length),
      0,
    );
    if (others + text.length > this.room) throw new DOMException("there is no room", "QuotaExceededError");
    this.items.set(name, text);
  };
}
